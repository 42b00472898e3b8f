"""Language: the next character of real text, or what kind of token a character of source code is in.

The default text needs no download: the source code of Python's standard library. A model is pre-trained on many modules and fine-tuned on the beginning of
another one; what is tested is how well it knows the end of that.
"""

from __future__ import annotations

import hashlib
import io
import keyword
import sys
import sysconfig
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.tasks.base import Task, TaskConfig, data_root, hash_of
from limbeck.tasks.text_windows import ASCII, Characters, TokenWindows

WINDOW = 64
MODULE = "_pydecimal.py"
TRAIN, VAL, TEST = 24_000, 20_000, 60_000
PRETRAINING, MODULES = 600_000, 35
KINDS = ("space", "name", "keyword", "number", "string", "comment", "operator")
_TOKENS = {
    tokenize.NAME: 1,
    tokenize.NUMBER: 3,
    tokenize.STRING: 4,
    tokenize.COMMENT: 5,
    tokenize.OP: 6,
    **{  # parts of f-strings, from Python 3.12 on
        getattr(tokenize, name): 4
        for name in ("FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END")
        if hasattr(tokenize, name)
    },
}


@dataclass
class LanguageTask(Task):
    """A task on text.

    Attributes:
        pretraining: other text of the same kind, for the teacher to begin with; None: there is none.
        characters: ids and characters.
    """

    pretraining: TokenWindows | None = None
    characters: Characters | None = None

    @property
    def fingerprint(self) -> str:
        before = None if self.pretraining is None else self.pretraining.fingerprint()
        return hash_of(super().fingerprint, before)


def load_stdlib_text(config: TaskConfig) -> LanguageTask:
    """``stdlib-text``: characters of the standard library of this Python.

    Fine-tuning on the first 24,000 characters of ``_pydecimal.py`` (``train_size``: so many), validation on 20,000 and testing on the last 60,000 of it;
    pre-training on about 600,000 characters of other modules at the top level.

    Raises:
        InputError: settings without a meaning here, or no standard library in source form.
    """
    _check(config)
    root = _library()
    text = _ascii((root / MODULE).read_text(encoding="utf-8"))
    size = config.train_size or TRAIN
    if size > len(text) - VAL - TEST:
        raise InputError(f"train_size {size} is more than the {len(text) - VAL - TEST:,} training characters there are")
    parts = {"train": text[:size], "val": text[-TEST - VAL : -TEST], "test": text[-TEST:]}
    return _causal(
        "stdlib-text",
        parts,
        Characters(ASCII),
        config,
        source=f"Python {_python()} standard library, {MODULE}",
        before=_other_modules(root),
    )


def load_stdlib_tokens(config: TaskConfig) -> LanguageTask:
    """``stdlib-tokens``: for each character of source code the kind of token that it is in, by Python's own tokenizer.

    The kinds are :data:`KINDS`. Windows begin anywhere, so a model must tell from what it sees whether it is within a string. Split by module: the last
    fifth of the modules, in an order by hash, is for testing, the fifth before for validation.

    Raises:
        InputError: as :func:`load_stdlib_text`.
    """
    _check(config)
    characters = Characters(ASCII)
    texts = [_ascii(path.read_text(encoding="utf-8")) for path in _modules(_library())[:MODULES]]
    tagged = [(text, kinds) for text in texts for kinds in [token_kinds(text)] if kinds is not None]
    fifth = max(1, len(tagged) // 5)
    chosen = {"train": tagged[: -2 * fifth], "val": tagged[-2 * fifth : -fifth], "test": tagged[-fifth:]}
    data: dict[str, Any] = {}
    for part, most in (("train", config.train_size or 200_000), ("val", VAL), ("test", TEST)):
        ids = characters.encode("".join(text for text, _ in chosen[part]))[:most]
        tags = torch.cat([kinds for _, kinds in chosen[part]])[:most]
        moving = part == "train" and config.augment
        data[part] = TokenWindows(ids, WINDOW, tags=tags, augment=moving, seed=config.split_seed)
    network = f"berttagger-d64-l3-h4-v{len(characters)}"
    return LanguageTask(
        name="stdlib-tokens",
        num_classes=len(KINDS),
        in_shape=(WINDOW,),
        class_names=list(KINDS),
        networks={"student": network, "teacher": network},
        source=f"Python {_python()} standard library, {len(tagged)} modules",
        characters=characters,
        **data,
    )


def load_wikitext(config: TaskConfig) -> LanguageTask:
    """``wikitext-2``: characters of the validation part for training (the last tenth of it for validation), of the test part for testing.

    Raises:
        InputError: the files are not there.
    """
    _check(config)
    texts = [_file(config, "wikitext-2", f"{part}.txt") for part in ("valid", "test")]
    return _split("wikitext-2", texts[0], texts[1], config, source="WikiText-2, validation and test parts")


def load_shakespeare(config: TaskConfig) -> LanguageTask:
    """``tinyshakespeare``: characters; the last tenth is for testing, the tenth before for validation.

    Raises:
        InputError: the file is not there.
    """
    _check(config)
    return _split("tinyshakespeare", _file(config, "tinyshakespeare", "input.txt"), None, config, source="Shakespeare")


def load_file(config: TaskConfig) -> LanguageTask:
    """``text``: a text file of a user's own, UTF-8; the last tenth is for testing, the tenth before for validation.

    Raises:
        InputError: no such file, no text, or too little of it.
    """
    _check(config)
    if config.data is None:
        raise InputError("the task 'text' needs a file: --data mine.txt")
    path = Path(config.data).expanduser()
    return _split(path.stem, _read(path), None, config, source=str(path))


# ---- making tasks ----------------------------------------------------------------------------------------------------


def _split(name: str, text: str, test: str | None, config: TaskConfig, *, source: str) -> LanguageTask:
    """Train, validation and test parts of a text; the latter two are cut to what is judged in seconds."""
    tenth = len(text) // 10
    if tenth <= WINDOW:
        raise InputError(f"{source} has {len(text):,} characters: a language task needs more than {10 * WINDOW + 10}")
    if test is None:
        text, test = text[:-tenth], text[-tenth:]
    train, val = text[:-tenth], text[-tenth:]
    if config.train_size is not None:
        if config.train_size > len(train):
            raise InputError(
                f"train_size {config.train_size} is more than the {len(train):,} training characters there are"
            )
        train = train[: config.train_size]
    parts = {"train": train, "val": val[:VAL], "test": test[:TEST]}
    return _causal(name, parts, Characters.of(train), config, source=source)


def _causal(
    name: str, parts: dict[str, str], characters: Characters, config: TaskConfig, *, source: str, before: str = ""
) -> LanguageTask:
    data: dict[str, Any] = {
        part: TokenWindows(
            characters.encode(text), WINDOW, augment=part == "train" and config.augment, seed=config.split_seed
        )
        for part, text in parts.items()
    }
    network = "gpt-d64-l3-h4"
    return LanguageTask(
        name=name,
        num_classes=len(characters),
        in_shape=(WINDOW,),
        class_names=list(characters.alphabet),
        networks={"student": network, "teacher": network},
        source=source,
        pretraining=TokenWindows(characters.encode(before), WINDOW, augment=True) if before else None,
        characters=characters,
        **data,
    )


def token_kinds(text: str) -> Tensor | None:
    """(length,) int64: for each character of a Python source the number of its kind in :data:`KINDS`; None where it is no Python."""
    kinds = torch.zeros(len(text), dtype=torch.long)
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            kind = _TOKENS.get(token.type, 0)
            kind = 2 if kind == 1 and keyword.iskeyword(token.string) else kind
            first, last = (starts[row - 1] + column for row, column in (token.start, token.end))
            kinds[first:last] = kind
    except (tokenize.TokenError, SyntaxError, IndexError):
        return None
    return kinds


# ---- reading texts ---------------------------------------------------------------------------------------------------


def _check(config: TaskConfig) -> None:
    for name in ("labelled", "image_size", "label_column"):
        if getattr(config, name) is not None:
            raise InputError(f"{name} has no meaning for text: leave it out")
    if config.label_noise:
        raise InputError("label_noise has no meaning for text: leave it out")


def _library() -> Path:
    root = Path(sysconfig.get_paths()["stdlib"])
    if not (root / MODULE).is_file():
        raise InputError(f"there is no {MODULE} under {root}: this Python has no standard library in source form")
    return root


def _modules(root: Path) -> list[Path]:
    """Top-level modules but the one that is fine-tuned on, in an order by a hash of their names; no tables."""
    files = [p for p in root.glob("*.py") if p.name != MODULE and 5_000 < p.stat().st_size < 60_000]
    return sorted(files, key=lambda p: hashlib.blake2b(p.name.encode(), digest_size=8).digest())


def _other_modules(root: Path) -> str:
    text = ""
    for path in _modules(root):
        if len(text) >= PRETRAINING:
            break
        text += _ascii(path.read_text(encoding="utf-8"))
    return text[:PRETRAINING]


def _ascii(text: str) -> str:
    return text.expandtabs(4).replace("\r\n", "\n").replace("\f", "")


def _file(config: TaskConfig, folder: str, name: str) -> str:
    root = data_root(config)
    if root is None:
        raise InputError(f"{folder} is read from a data root: set --data-root or $LIMBECK_DATA to the folder above it")
    return _read(root / folder / name)


def _read(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"{path} is no file: text is read from there")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path} is no text in UTF-8") from None


def _python() -> str:
    return ".".join(map(str, sys.version_info[:3]))
