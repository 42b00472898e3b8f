"""Language tasks: real text, windows that count every token once, kinds of tokens, a user's own file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from limbeck.core.errors import InputError
from limbeck.tasks.base import TaskConfig, load_task
from limbeck.tasks.language import KINDS, token_kinds
from limbeck.tasks.text_windows import ASCII, UNKNOWN, Characters, TokenWindows


def task(name: str = "stdlib-text", **settings: object):
    return load_task(TaskConfig.make(task=name, **settings))


def test_characters_go_there_and_back() -> None:
    characters = Characters()
    assert len(characters) == 97
    text = "def f(x):\n    return x | 1\n"
    assert characters.decode(characters.encode(text)) == text
    assert characters.decode(characters.encode("é→a")) == UNKNOWN * 2 + "a"
    own = Characters.of("aaab→→", most=2)
    assert own.alphabet == UNKNOWN + "a→"


@pytest.mark.parametrize("length", [65, 127, 128, 190, 500])
def test_every_token_is_predicted_once(length: int) -> None:
    data = TokenWindows(torch.arange(length), 64)
    batch = data.fetch(torch.arange(len(data)), None)
    counted = batch.labels[:, 1:]
    assert sorted(counted[counted != -100].tolist()) == list(range(1, length))
    assert torch.equal(batch.inputs["input_ids"].diff(), torch.ones(len(data), 63, dtype=torch.long))
    tags = TokenWindows(torch.arange(length), 64, tags=torch.arange(length))
    labels = tags.fetch(torch.arange(len(tags)), None).labels
    assert sorted(labels[labels != -100].tolist()) == list(range(length))


def test_views_shift_all_windows_and_can_be_replayed() -> None:
    data = TokenWindows(torch.arange(1000), 64, augment=True, seed=1)
    index = torch.arange(len(data))
    views = [data.fetch(index, view).inputs["input_ids"] for view in (0, 1, 1, 2)]
    assert torch.equal(views[1], views[2]) and not torch.equal(views[0], views[1])
    starts = {int(data.fetch(index, view).inputs["input_ids"][0, 0]) for view in range(400)}
    assert starts == set(range(63))
    assert max(int(data.fetch(index, v).inputs["input_ids"].max()) for v in range(100)) < 1000
    assert data.augmented and data.fingerprint() != TokenWindows(torch.arange(1000), 64).fingerprint()


def test_windows_need_enough_tokens() -> None:
    with pytest.raises(InputError, match="64 tokens are too few for windows of 64"):
        TokenWindows(torch.arange(64), 64)
    with pytest.raises(InputError, match="65 tokens but 3 tags"):
        TokenWindows(torch.arange(65), 64, tags=torch.arange(3))


def test_the_standard_library_is_the_text() -> None:
    found = task()
    assert (found.num_classes, found.in_shape) == (97, (64,))
    assert len(found.train.tokens) == 24_000 and len(found.test.tokens) == 60_000
    assert found.characters.decode(found.train.tokens[:40]).startswith("# Copyright (c) 2004 Python")
    assert 590_000 < len(found.pretraining.tokens) <= 600_000
    assert float((found.train.tokens == 0).double().mean()) < 1e-3
    assert found.class_names == list(ASCII)
    assert task(train_size=10_000).fingerprint != found.fingerprint
    assert found.describe()["train"] == len(found.train)


def test_kinds_of_tokens() -> None:
    kinds = token_kinds("def f(x):  # two\n    return 'a' + x\n")
    shown = [KINDS[k] for k in kinds.tolist()]
    assert shown[:10] == ["keyword"] * 3 + ["space", "name", "operator", "name", "operator", "operator", "space"]
    assert shown[11:16] == ["comment"] * 5
    assert shown[21:27] == ["keyword"] * 6
    assert shown[28:31] == ["string"] * 3
    assert token_kinds("def (:\n  '''") is None
    found = task("stdlib-tokens", train_size=5000)
    assert found.num_classes == 7
    labels = found.test.fetch(torch.arange(len(found.test)), None).labels
    shares = torch.bincount(labels[labels >= 0], minlength=7) / (labels >= 0).sum()
    assert (shares > 0.002).all()
    assert found.fingerprint is not None


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("Ein Satz über Öfen. " * 200, encoding="utf-8")
    found = load_task(TaskConfig.make(data=str(path)))
    assert found.name == "mine" and found.num_classes == len(set("Ein Satz über Öfen. ")) + 1
    assert found.pretraining is None
    assert len(found.train.tokens) + len(found.val.tokens) + len(found.test.tokens) == 4000
    path.write_text("zu kurz")
    with pytest.raises(InputError, match="has 7 characters"):
        load_task(TaskConfig.make(data=str(path)))
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="no text in UTF-8"):
        load_task(TaskConfig.make(data=str(path)))


def test_wrong_settings_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIMBECK_DATA", raising=False)
    with pytest.raises(InputError, match="image_size has no meaning for text"):
        task(image_size=8)
    with pytest.raises(InputError, match="label_noise has no meaning for text"):
        task(label_noise=0.1)
    with pytest.raises(InputError, match="train_size 1000000 is more than"):
        task(train_size=1_000_000)
    with pytest.raises(InputError, match="set --data-root"):
        task("tinyshakespeare")
    with pytest.raises(InputError, match=r"test.txt is no file|valid.txt is no file"):
        task("wikitext-2", data_root=str(tmp_path))
    with pytest.raises(InputError, match="--data mine.txt"):
        task("text")


def test_files_under_a_data_root(tmp_path: Path) -> None:
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "wikitext-2" / "valid.txt").write_text("a b c d e f g h " * 100)
    (tmp_path / "wikitext-2" / "test.txt").write_text("i j k l " * 100)
    found = task("wikitext-2", data_root=str(tmp_path), train_size=1000)
    assert len(found.train.tokens) == 1000 and len(found.test.tokens) == 800
    assert (found.test.tokens[::2] == 0).all()  # letters that the training text lacks
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text("To be, or not to be. " * 100)
    assert len(task("tinyshakespeare", data_root=str(tmp_path)).test.tokens) == 210
