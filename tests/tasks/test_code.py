"""The code-search task on a few made-up modules: no name leaks, disjoint modules, stable ids, replayable views."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch

from limbeck.core.data import Stream
from limbeck.core.errors import InputError
from limbeck.tasks import code as module
from limbeck.tasks.base import TaskConfig, load_task
from limbeck.tasks.code import (
    Function,
    distinct,
    first_sentence,
    functions_in_file,
    functions_of,
    library_files,
    make_task,
    masked_source,
    read_pairs,
    split_by_module,
)
from limbeck.tasks.pairs import CodeViews, Contexts, TextPairs, frequent_words
from limbeck.tasks.tokens import FIRST, MARK, NAMELESS, HashTokenizer, pieces, token_id, words_of

SOURCE = '''
class Shelf:
    """A shelf of things to keep."""

    def fetch_item(self, key, fallback=None):
        """Return the item under a key. More is said here."""
        if key in self.items:
            return self.items[key]
        log("fetch_item() found nothing", key=key)
        found = self._Fetch_Item_(key) or fetch_item(key)
        def inner(x):
            """An inner docstring that must not stay in the text."""
            return fallback if x else found
        return inner(found)

    def short(self):
        """Too short."""

    async def push(self, value):
        """Put a value onto the shelf

        and more of that."""
        global count
        count = value
'''
WORDS = [
    "open",
    "close",
    "read",
    "write",
    "seek",
    "scan",
    "parse",
    "merge",
    "split",
    "sort",
    "find",
    "count",
    "sum",
    "join",
    "trim",
    "fold",
    "map",
    "pack",
    "load",
    "save",
]


def corpus(modules: int = 20, each: int = 5) -> list[Function]:
    """Functions that all differ, in modules ``p<0..4>.m<n>``."""
    found = []
    for m in range(modules):
        for k in range(each):
            a, b, c = WORDS[m], WORDS[k], WORDS[(m * 7 + k * 3) % 20]
            body = " ".join(f"{a}{c} {b}{m}x{k} {c}{j} thing{m}{j}{k}" for j in range(4))
            found.append(
                Function(f"p{m % 5}.m{m}", k, f"{a} the {b} with {c}", f"def {MARK} self a{MARK} return a{MARK} {body}")
            )
    return found


def task(**settings):
    return make_task(
        "tiny", corpus(), TaskConfig.make(task="stdlib-code", **settings), tokenizer=HashTokenizer(length=24)
    )


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_functions_with_docstrings_are_found_and_masked() -> None:
    found = list(functions_of(SOURCE, "shelf"))
    assert [f.query for f in found] == [
        "Return the item under a key.",
        "An inner docstring that must not stay in the text.",
        "Put a value onto the shelf",
    ]
    text = found[0].code
    assert "docstring" not in text and "Return" not in text
    assert not {"fetch", "item"} & {p for w in words_of(text) for p in pieces(w)}
    assert text.split()[:5] == ["def", MARK, "self", f"key{MARK}", f"fallback{MARK}"]
    # As a keyword of somebody else's function, and as an attribute, the word is no local name.
    assert text.split().count(f"key{MARK}") == 6 and text.split().count("key") == 1
    assert f"count{MARK}" not in found[2].code and "value" + MARK in found[2].code


def test_masking_leaves_the_tree_as_it_was() -> None:
    tree = ast.parse(SOURCE)
    before = ast.dump(tree)
    masked_source(tree.body[0].body[1])
    assert ast.dump(tree) == before


def test_a_body_of_a_docstring_alone_still_is_a_body() -> None:
    node = ast.parse('def f():\n    """Nothing but these five words."""').body[0]
    assert masked_source(node) == f"def {MARK} pass"


def test_first_sentences() -> None:
    assert first_sentence("One thing.  Another.") == "One thing."
    assert first_sentence("Uses os.path\nfor it\n\nMore.") == "Uses os.path for it"


def test_real_modules_do_not_leak_names() -> None:
    root = Path(json.__file__).parents[1]
    found = [f for n in ("json/decoder.py", "textwrap.py", "bisect.py") for f in functions_in_file(root / n, root)]
    assert len(found) > 10 and {f.module for f in found} == {"json.decoder", "textwrap", "bisect"}
    assert {f.package for f in found} == {"json", "textwrap", "bisect"}
    defined = {
        n.name for n in ast.walk(ast.parse((root / "textwrap.py").read_text())) if isinstance(n, ast.FunctionDef)
    }
    for f in found:
        if f.module == "textwrap":
            words = f.code.split()
            assert words[0] == "def" and words[1] == MARK
            at = next(
                n
                for n in ast.walk(ast.parse((root / "textwrap.py").read_text()))
                if getattr(n, "lineno", 0) == f.line and getattr(n, "name", "") in defined
            )
            assert at.name not in words


def test_tests_and_packages_are_no_library(tmp_path) -> None:
    for name in ("a.py", "test/b.py", "site-packages/c.py", "pkg/tests/d.py", "pkg/e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(SOURCE)
    assert [p.relative_to(tmp_path).as_posix() for p in library_files(tmp_path)] == ["a.py", "pkg/e.py"]
    (tmp_path / "a.py").write_text("def broken(:")
    assert functions_in_file(tmp_path / "a.py", tmp_path) == []


# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_identifiers_split_on_case_and_underscores() -> None:
    assert pieces("getHTTPResponse_2") == ("get", "http", "response", "2")
    assert pieces("__init__") == ("init",) and pieces("Ω_X") == ("ω", "x")
    assert words_of("a.b_c(1, 'x y')") == ["a", "b_c", "1", "x", "y"]


def test_ids_are_those_of_a_published_hash_and_not_of_this_process() -> None:
    assert (token_id("response", 4096), token_id("read", 64)) == (1350, 55)  # BLAKE2b of 8 bytes, by hand


def test_encoding_truncates_with_a_count_and_marks_local_words() -> None:
    encoded = HashTokenizer(length=4).encode([f"def {MARK} keyTwo{MARK} self more", "one"])
    assert encoded.truncated == 1 and encoded.ids.shape == (2, 4)
    assert encoded.ids[0, 1] == NAMELESS and encoded.local[0].tolist() == [False, False, True, True]
    assert encoded.ids[1].tolist()[1:] == [0, 0, 0] and encoded.ids[1, 0] >= FIRST
    with pytest.raises(InputError, match="text 1 holds no word"):
        HashTokenizer().encode(["a", "..."])
    with pytest.raises(InputError, match="more than 8 ids"):
        HashTokenizer(vocabulary=8)


# ---- splitting -------------------------------------------------------------------------------------------------------


def test_near_duplicates_go_and_the_first_stays() -> None:
    a = list(range(30))
    assert distinct([a, [99, *a], list(range(50, 80)), a[:15], a]) == [0, 2, 3]
    assert distinct([[1, 2], [1, 2], [2, 1]]) == [0, 2]
    # What resembles only something that went stays.
    chain = [list(range(30)), list(range(3, 33)), list(range(6, 36))]
    assert distinct(chain) == [0, 2]


def test_parts_share_no_module_and_the_split_is_fixed() -> None:
    modules = [f.module for f in corpus()]
    parts = split_by_module(modules, 12, 0)
    sets = {k: {modules[i] for i in v.tolist()} for k, v in parts.items()}
    assert not sets["train"] & sets["test"] and not sets["train"] & sets["val"] and not sets["val"] & sets["test"]
    assert sum(len(v) for v in parts.values()) == 100 and len(parts["test"]) >= 12
    assert all(torch.equal(v, split_by_module(modules, 12, 0)[k]) for k, v in parts.items())
    assert not torch.equal(parts["test"], split_by_module(modules, 12, 1)["test"])
    with pytest.raises(InputError, match="too few modules"):
        split_by_module(["a", "a", "b"], 1, 0)


def test_the_task() -> None:
    made = task()
    said = made.describe()
    assert (said["vocabulary"], said["input_shape"], said["train"] + said["val"] + said["test"]) == (4096, [24], 100)
    assert said["documents_truncated"] > 0 and said["queries_truncated"] == 0
    assert made.fingerprint == task().fingerprint != task(split_seed=1).fingerprint
    assert len(task(train_size=30).train) == 30
    for data in (made.val, made.test):
        assert len(torch.unique(data.query, dim=0)) == len(data)
    with pytest.raises(InputError, match="train_size 500 is more than"):
        task(train_size=500)
    with pytest.raises(InputError, match="at least 10"):
        make_task("x", corpus(1, 3), TaskConfig.make())


def test_load_task_reads_the_cached_library_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path))
    root = tmp_path / "lib"
    for n in range(12):
        (root / f"m{n}.py").parent.mkdir(exist_ok=True)
        (root / f"m{n}.py").write_text(
            f'def f{n}(a{n}):\n    """Do the thing with number {n}."""\n    return go{n}(a{n}, {n})\n'
        )
    monkeypatch.setattr(module.sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    first = load_task(TaskConfig.make(task="stdlib-code"))
    for n in range(12):
        (root / f"m{n}.py").unlink()
    assert load_task(TaskConfig.make(task="stdlib-code")).fingerprint == first.fingerprint
    for settings in ({"labelled": 3}, {"image_size": 8}, {"label_noise": 0.1}):
        with pytest.raises(InputError, match="no meaning for pairs"):
            load_task(TaskConfig.make(task="stdlib-code", **settings))


# ---- a user's own pairs ----------------------------------------------------------------------------------------------


def test_own_pairs(tmp_path) -> None:
    rows = [{"id": n, "title": f.query, "body": f.code, "module": f.module} for n, f in enumerate(corpus())]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    made = load_task(TaskConfig.make(task="stdlib-code", data=str(path)))
    assert made.name == "mine" and len(made.train) + len(made.val) + len(made.test) == 100
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "mine.parquet")
    assert (
        load_task(TaskConfig.make(task="stdlib-code", data=str(tmp_path / "mine.parquet"))).fingerprint
        == made.fingerprint
    )


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.jsonl", None, "is no file"),
        ("a.txt", "x", "neither .jsonl nor .parquet"),
        ("a.jsonl", "{", "is not JSON lines"),
        ("a.jsonl", "", "no rows"),
        ("a.jsonl", '{"a": "x", "n": 3}', "needs two columns of text; it has a, n"),
        ("a.jsonl", '{"a": "x", "b": "y"}\n{"a": "x"}', "row 1 .* lacks a text in 'a' or 'b'"),
    ],
)
def test_bad_files(tmp_path, name: str, text: str | None, line: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=line):
        read_pairs(tmp_path / name)


# ---- pairs, views, contexts ------------------------------------------------------------------------------------------


def test_equal_queries_are_one_group() -> None:
    query = torch.tensor([[9, 8, 0], [9, 0, 0], [9, 8, 0]])
    pairs = TextPairs(query, torch.arange(9).view(3, 3) + 8)
    batch = pairs.fetch(torch.tensor([2, 1, 0]), 0)
    assert batch.labels[0] == batch.labels[2] != batch.labels[1]
    assert set(batch.inputs) == {"query", "document"}
    assert pairs.fetch(torch.tensor([1]), 0).inputs["query"]["input_ids"].shape == (1, 1)
    assert batch.inputs["query"]["attention_mask"].tolist() == [[1, 1], [1, 0], [1, 1]]
    with pytest.raises(InputError, match="at least one pair"):
        TextPairs(query[:0], query[:0])
    with pytest.raises(InputError, match="as many rows"):
        TextPairs(query, query[:2])


def test_renaming_is_consistent_and_touches_local_words_only() -> None:
    words = torch.arange(100, 400)
    views = CodeViews(words, words[:0])
    ids = torch.tensor([[10, 11, 10, 12, 10], [10, 11, 10, 12, 10]])
    local = torch.tensor([[True, False, True, False, False]] * 2)
    out = views.rename(ids, local, torch.tensor([3, 4]), 77)
    assert torch.equal(out[:, [1, 3, 4]], ids[:, [1, 3, 4]])
    assert out[0, 0] == out[0, 2] >= 100 and out[1, 0] == out[1, 2] != out[0, 0]
    assert torch.equal(out, views.rename(ids, local, torch.tensor([3, 4]), 77))
    assert not torch.equal(out, views.rename(ids, local, torch.tensor([3, 4]), 78))


def test_frequent_words_are_replaced_at_the_rate() -> None:
    views = CodeViews(torch.arange(1000, 2000), torch.tensor([10, 11]), 0.3)
    ids = torch.tensor([10, 50] * 50).expand(200, -1)
    out = views.replace(ids, torch.arange(200), 5)
    changed = out != ids
    assert not changed[:, 1::2].any()
    assert changed[:, ::2].float().mean() == pytest.approx(0.3, abs=0.02)
    assert changed[:, ::2].float().mean(0).std() < 0.06  # at every place
    words, top = frequent_words(torch.tensor([[9, 9, 10, 0], [10, 9, 20, 3]]), 2)
    assert words.tolist() == [9, 10, 20] and top.tolist() == [9, 10]


def test_views_are_replayable_and_differ() -> None:
    train, index = task().train, torch.arange(6)
    again = task().train
    for view in (None, 0, 3):
        a, b = train.fetch(index, view).inputs, again.fetch(index, view).inputs
        assert all(torch.equal(a[s]["input_ids"], b[s]["input_ids"]) for s in ("query", "document", "other"))
    plain, first = train.fetch(index, None).inputs, train.fetch(index, 0).inputs
    assert torch.equal(plain["document"]["input_ids"], train.document[index])
    assert not torch.equal(plain["document"]["input_ids"], first["document"]["input_ids"])
    assert not torch.equal(first["document"]["input_ids"], first["other"]["input_ids"])
    assert torch.equal(first["document"]["attention_mask"], first["other"]["attention_mask"])
    single = train.fetch(torch.tensor([3]), 0).inputs["other"]["input_ids"]
    assert torch.equal(single[0], first["other"]["input_ids"][3][: single.shape[1]])
    assert task(augment=False).train.fetch(index, 0).inputs.keys() == {"query", "document"}


def test_instructions_stand_in_front() -> None:
    made = task()
    longer = made.prefixed([20, 21], [30])
    assert (longer.train.query[:, :2] == torch.tensor([20, 21])).all() and (longer.test.document[:, 0] == 30).all()
    assert torch.equal(longer.train.document[:, 1:], made.train.document[:, :-1])
    assert longer.train.document.shape == made.train.document.shape and not longer.train.local[:, 0].any()
    with pytest.raises(InputError, match="no room"):
        made.prefixed([20] * 24, [30])


def test_windows_of_joined_documents() -> None:
    train = task().train
    contexts = train.contexts(32, seed=1)
    batch = contexts.fetch(torch.arange(len(contexts)), 2)
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    assert ids.shape == (len(contexts), 32) and (ids[:, 0] == 3).all()
    last = mask.sum(1) - 1
    assert (ids[torch.arange(len(ids)), last] == 2).all() and ((ids == 2).sum(1) == 1).all()
    assert batch.labels.float().mean() == pytest.approx(0.5, abs=0.2)
    # The first part is the sample's own document, the second one is of the same repository where the label says so.
    whole = {tuple(d[:24].tolist()): int(r) for d, r in zip(train.document, train.repository, strict=True)}
    for row, label, anchor in zip(ids, batch.labels, contexts.anchors, strict=True):
        cuts = (row == 3).nonzero().flatten().tolist()
        assert torch.equal(row[1 : cuts[1]], train.document[anchor][: cuts[1] - 1])
        part = row[cuts[1] + 1 : (cuts[2] if len(cuts) > 2 else 31)].tolist()
        owners = {r for d, r in whole.items() if list(d[: len(part)]) == part}
        assert (int(train.repository[anchor]) in owners) == bool(label)
    again = train.contexts(32, seed=1).fetch(torch.arange(5), 2)
    assert torch.equal(again.inputs["input_ids"], ids[:5])
    assert not torch.equal(contexts.fetch(torch.arange(5), 3).inputs["input_ids"], ids[:5])
    assert Stream(contexts, 8).steps_per_epoch == len(contexts) // 8
    with pytest.raises(InputError, match="names none"):
        TextPairs(train.query, train.document).contexts(32)
    with pytest.raises(InputError, match="two repositories"):
        TextPairs(train.query, train.document, repository=torch.zeros(len(train)).long()).contexts(32)
    with pytest.raises(InputError, match="at least 8"):
        Contexts(train, 7)
