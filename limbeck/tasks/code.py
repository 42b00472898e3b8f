"""Finding code by what it does: the documented functions of Python's own standard library, or text pairs of a user's own."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import sys
import sysconfig
import tokenize
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from limbeck.core.data import mix_seed
from limbeck.core.errors import InputError
from limbeck.core.files import write_text
from limbeck.tasks.base import TaskConfig, cache_folder
from limbeck.tasks.pairs import CodeViews, PairTask, TextPairs, frequent_words
from limbeck.tasks.tokens import MARK, HashTokenizer, words_of

RECIPE = 1  # part of the cache's name: raise it when functions are read differently
POOL = 500
NEAR = 0.7
BIG_MODULE = 0.03
_DOCUMENTED = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "turtledemo", "__pycache__"}


@dataclass(frozen=True)
class Function:
    """A documented function.

    Attributes:
        module: dotted path of its file; ``package`` is the first part of it.
        line: where it starts.
        query: the first sentence of its docstring.
        code: its source without docstrings and comments; its own name is replaced everywhere, and local identifiers carry
            :data:`limbeck.tasks.tokens.MARK` behind them.
    """

    module: str
    line: int
    query: str
    code: str

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


def load(config: TaskConfig) -> PairTask:
    """The task ``stdlib-code``, or with ``data`` the pairs of a jsonl or parquet file.

    Standard library: query = first sentence of a docstring of at least five words; document = the function's source, docstring
    removed, name masked. Functions are split by module: about 500 for testing and for validation each, which are the pools that
    are searched, and the rest for training; modules with more than 3 % of all functions are for training. Near-duplicates (Jaccard
    similarity of runs of five tokens at 0.7 or above) are removed, and equal queries within a pool. Texts are cut to 64 tokens.

    Raises:
        InputError: settings that make no sense here, no standard library in source form, or a file that is not what it should be.
    """
    for name in ("labelled", "image_size"):
        if getattr(config, name) is not None:
            raise InputError(f"{name} has no meaning for pairs of texts: leave it out")
    if config.label_noise:
        raise InputError("label_noise has no meaning for pairs of texts: leave it out")
    if config.data is None:
        return make_task("stdlib-code", stdlib_functions(), config, source=f"Python {_python()} standard library")
    path = Path(config.data).expanduser()
    return make_task(path.stem, read_pairs(path), config, source=str(path))


def make_task(
    name: str,
    functions: Sequence[Function],
    config: TaskConfig,
    *,
    source: str = "",
    tokenizer: HashTokenizer | None = None,
    pool: int = POOL,
) -> PairTask:
    """A retrieval task from functions (or text pairs in their form).

    Args:
        functions: in a fixed order.
        config: ``train_size``, ``augment`` (replaced words, code-to-code pairs) and ``split_seed`` count.
        pool: most pairs for validation and for testing; never more than a fifth of all.

    Raises:
        InputError: fewer than ten pairs after near-duplicates are gone.
    """
    tokenizer = tokenizer or HashTokenizer()
    found = [(tokenizer.tokens(f.query), tokenizer.tokens(f.code)) for f in functions]
    there = [n for n, (query, code) in enumerate(found) if query[0] and code[0]]
    kept = [there[n] for n in distinct([found[n][1][0] for n in there])]
    if len(kept) < 10:
        raise InputError(f"{source or name} has {len(kept)} pairs that differ: a retrieval task needs at least 10")
    query = tokenizer.pad([found[n][0] for n in kept])
    document = tokenizer.pad([found[n][1] for n in kept])
    modules = [functions[n].module for n in kept]
    packages = {p: i for i, p in enumerate(sorted({functions[n].package for n in kept}))}
    repository = torch.tensor([packages[functions[n].package] for n in kept])
    keys = [tuple(found[n][0][0][: tokenizer.length]) for n in kept]
    parts = split_by_module(modules, min(pool, max(1, len(kept) // 5)), config.split_seed, keys)
    whole = TextPairs(query.ids, document.ids, local=document.local, repository=repository, seed=config.split_seed)
    train = parts["train"]
    if config.train_size is not None:
        if config.train_size > len(train):
            raise InputError(f"train_size {config.train_size} is more than the {len(train)} training samples there are")
        train = train[_order(len(train), config.split_seed, 61)[: config.train_size]].sort().values
    views = CodeViews(*frequent_words(document.ids[train])) if config.augment else None
    made: dict[str, Any] = {"train": whole.subset(train)}
    for part in ("val", "test"):
        chosen = _first_of_each(query.ids, parts[part])
        chosen = chosen[_order(len(chosen), config.split_seed, 67)[:pool]].sort().values
        made[part] = whole.subset(chosen)
    for data in made.values():
        data.views = views
    return PairTask(
        name=name,
        num_classes=tokenizer.vocabulary,
        in_shape=(tokenizer.length,),
        class_names=[],
        networks={"student": "modernbert-d64-l6-h4"},
        source=source,
        about={
            "near_duplicates_removed": len(there) - len(kept),
            "queries_truncated": query.truncated,
            "documents_truncated": document.truncated,
            "modules": len(set(modules)),
        },
        **made,
    )


# ---- reading functions -----------------------------------------------------------------------------------------------


def stdlib_functions() -> list[Function]:
    """The documented functions of this interpreter's standard library, from the cache folder where they are there.

    Raises:
        InputError: its sources are not there.
    """
    path = cache_folder() / "code" / f"stdlib-{_python()}-{RECIPE}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            root = Path(sysconfig.get_paths()["stdlib"])
            found = [f for file in library_files(root) for f in functions_in_file(file, root)]
            if not found:
                raise InputError(
                    f"no documented functions under {root}: this Python has no standard library in source form"
                )
            write_text(path, json.dumps([astuple(f) for f in found]))
        return [Function(*entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


def library_files(root: Path) -> list[Path]:
    """The library's own source files, tests and installed packages left out, in the order of their paths."""
    files = (p for p in root.rglob("*.py") if not _NOT_LIBRARY & set(p.relative_to(root).parts))
    return sorted(files, key=lambda p: p.relative_to(root).as_posix())


def functions_in_file(file: Path, root: Path) -> list[Function]:
    """The documented functions of one file; none where it is not in the language of this interpreter."""
    parts = file.relative_to(root).with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
    try:
        with tokenize.open(file) as opened:
            return list(functions_of(opened.read(), module))
    except (SyntaxError, UnicodeDecodeError):  # templates and deliberately broken files
        return []


def functions_of(source: str, module: str, least_words: int = 5) -> Iterator[Function]:
    """Every function and method with a docstring of at least ``least_words`` words, in the order of the source.

    Raises:
        SyntaxError: ``source`` is no Python.
    """
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in sorted(nodes, key=lambda n: (n.lineno, n.col_offset)):
        docstring = ast.get_docstring(node)
        if docstring is not None and len(docstring.split()) >= least_words:
            yield Function(module, node.lineno, first_sentence(docstring), masked_source(node))


def first_sentence(docstring: str) -> str:
    """Up to the first full stop before a space, or the end of the first paragraph, on one line."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    end = next((i for i in range(len(paragraph) - 1) if paragraph[i] in ".!?" and paragraph[i + 1] == " "), None)
    return paragraph if end is None else paragraph[: end + 1]


def masked_source(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """A function's source without docstrings and comments, its name replaced everywhere, local identifiers marked.

    A word is the name if the two are equal but for case and underscores at the ends, in strings too.
    """
    name = node.name.strip("_").casefold()
    with _marked(node, _local_names(node)):
        text = ast.unparse(node)
    return " ".join(MARK if word.rstrip(MARK).strip("_").casefold() == name else word for word in words_of(text))


def _local_names(node: ast.AST) -> set[str]:
    inside = list(ast.walk(node))
    names = {a.arg for a in inside if isinstance(a, ast.arg)}
    names |= {n.id for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for statement in inside:
        if isinstance(statement, ast.Global | ast.Nonlocal):
            names -= set(statement.names)
    return names - {"self", "cls"}


@contextmanager
def _marked(node: ast.AST, local: set[str]) -> Iterator[None]:
    """Inside, the tree has no docstrings and its local names are marked; afterwards it is as before. Copying it is far slower."""
    undo: list[tuple[ast.AST, str, Any]] = []
    for inner in list(ast.walk(node)):
        if isinstance(inner, ast.Name) and inner.id in local:
            undo.append((inner, "id", inner.id))
            inner.id += MARK
        elif isinstance(inner, ast.arg) and inner.arg in local:
            undo.append((inner, "arg", inner.arg))
            inner.arg += MARK
        elif isinstance(inner, _DOCUMENTED) and ast.get_docstring(inner, clean=False) is not None:
            undo.append((inner, "body", inner.body))
            inner.body = inner.body[1:] or [ast.Pass()]
    try:
        yield
    finally:
        for inner, field, value in undo:
            setattr(inner, field, value)


# ---- a user's own pairs ----------------------------------------------------------------------------------------------


def read_pairs(path: Path) -> list[Function]:
    """Pairs from a ``.jsonl`` or ``.parquet`` file: columns ``query`` and ``document``, else the first two that hold text.

    A column ``module`` keeps pairs of one module in one part; without it every pair is by itself.

    Raises:
        InputError: no such file, another kind of file, fewer than two columns of text, or a row that lacks one.
    """
    if not path.is_file():
        raise InputError(f"{path} is no file: pairs of texts are read from a .jsonl or .parquet file")
    rows: list[dict[str, Any]]
    if path.suffix == ".parquet":
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(path).to_pylist()
    elif path.suffix in (".jsonl", ".ndjson"):
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise InputError(f"{path} is not JSON lines: every line must be an object with two texts") from None
    else:
        raise InputError(f"{path} is neither .jsonl nor .parquet: pairs of texts are read from these")
    if not rows or not isinstance(rows[0], dict):
        raise InputError(f"{path} holds no rows with named columns")
    texts = [key for key, value in rows[0].items() if isinstance(value, str) and key != "module"]
    columns = ["query", "document"] if {"query", "document"} <= set(texts) else texts[:2]
    if len(columns) < 2:
        raise InputError(f"{path} needs two columns of text; it has {', '.join(map(str, rows[0])) or 'none'}")
    for number, row in enumerate(rows):
        if not all(isinstance(row.get(column), str) and words_of(row[column]) for column in columns):
            raise InputError(f"row {number} of {path} lacks a text in '{columns[0]}' or '{columns[1]}'")
    return [
        Function(str(row.get("module", f"pair{number}")), number, row[columns[0]], row[columns[1]])
        for number, row in enumerate(rows)
    ]


# ---- splitting -------------------------------------------------------------------------------------------------------


def distinct(documents: Sequence[Sequence[int]], near: float = NEAR, run: int = 5) -> list[int]:
    """Positions of the documents that resemble none before them, in ascending order.

    Two resemble each other if their sets of runs of ``run`` tokens have a Jaccard similarity of ``near`` or more; a document
    shorter than that is one run.
    """
    from scipy.sparse import csr_matrix

    sets = [np.unique(_runs(np.asarray(d, dtype=np.int64), run)) for d in documents]
    if not sets:
        return []
    sizes = np.array([len(s) for s in sets])
    _, columns = np.unique(np.concatenate(sets), return_inverse=True)
    pointers = np.concatenate([[0], sizes.cumsum()])
    present = csr_matrix((np.ones(len(columns), dtype=np.int32), columns, pointers))
    shared = (present @ present.T).tocoo()
    alike = shared.data >= near * (sizes[shared.row] + sizes[shared.col] - shared.data)
    pairs = alike & (shared.col < shared.row)
    before: dict[int, list[int]] = {}
    for later, earlier in zip(shared.row[pairs].tolist(), shared.col[pairs].tolist(), strict=True):
        before.setdefault(later, []).append(earlier)
    kept: list[int] = []
    gone: set[int] = set()
    for n in range(len(sets)):
        if any(m not in gone for m in before.get(n, ())):
            gone.add(n)
        else:
            kept.append(n)
    return kept


def _runs(ids: np.ndarray[Any, np.dtype[np.int64]], run: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A hash of every run of ``run`` ids."""
    run = min(run, len(ids))
    powers = np.array([pow(1_000_003, k, 1 << 61) for k in range(run)], dtype=np.int64)
    with np.errstate(over="ignore"):
        return (np.lib.stride_tricks.sliding_window_view(ids, run) * powers).sum(1) * (run + 1)


def split_by_module(
    modules: Sequence[str], size: int, seed: int, keys: Sequence[Hashable] | None = None
) -> dict[str, Tensor]:
    """Ids for ``train``, ``val`` and ``test``; all of a module are in one part.

    Modules, in an order that is a hash of their names and the seed, fill first ``test`` and then ``val`` up to ``size`` different
    ``keys`` (None: samples) or a little more. Modules with more than 3 % of everything go to ``train``, if they are not all like that.
    """
    members: dict[str, list[int]] = {}
    for n, module in enumerate(modules):
        members.setdefault(module, []).append(n)
    order = sorted(members, key=functools.partial(_rank, seed))
    small = [m for m in order if len(members[m]) <= BIG_MODULE * len(modules)]
    parts: dict[str, list[int]] = {"test": [], "val": [], "train": []}
    queue = iter(small if sum(len(members[m]) for m in small) > 2 * size else order)
    for part in ("test", "val"):
        for module in queue:
            parts[part] += members.pop(module)
            if len({n if keys is None else keys[n] for n in parts[part]}) >= size:
                break
    parts["train"] = [n for ids in members.values() for n in ids]
    if not all(parts.values()):
        raise InputError(
            "the pairs come from too few modules to be split by module: training, validation and test need one each"
        )
    return {name: torch.tensor(sorted(ids)) for name, ids in parts.items()}


def _rank(seed: int, module: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{module}".encode(), digest_size=16).digest()


def _order(count: int, *seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(mix_seed(*seed)))


def _first_of_each(rows: Tensor, ids: Tensor) -> Tensor:
    """Of the ids, those whose row equals no earlier one's."""
    _, inverse = torch.unique(rows[ids], dim=0, return_inverse=True)
    first = torch.full((int(inverse.max()) + 1,), len(ids)).scatter_reduce(0, inverse, torch.arange(len(ids)), "amin")
    return ids[first.sort().values]


def _python() -> str:
    return ".".join(map(str, sys.version_info[:3]))
