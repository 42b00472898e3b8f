"""Tasks of paired embeddings: disjoint parts, fitted to the bank only, and users' own files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.core.errors import InputError, UnknownNameError
from limbeck.tasks import embedding_sources
from limbeck.tasks.code import Function
from limbeck.tasks.documented_code import distinct_pairs, pairs_of, word_pieces
from limbeck.tasks.embedding_sources import split_rows, text_pairs
from limbeck.tasks.embeddings import EmbeddingPairs, EmbeddingSetup, EmbeddingTask, load_embeddings
from limbeck.tasks.judging_embeddings import RIVALS, Rival, judged, norms_of, objective, ranks_of, shape_of, tuned

torch.set_num_threads(1)

SOURCE = '''
class Reader:
    """Reads the records of a file, one after the other, until it ends."""
    size = 3
    def read_line(self, path):
        """Return the first line of a file, without the newline at its end."""
        with open(path) as opened:
            return opened.readline().rstrip()
    def short(self):
        """Too short."""
        return self.size
    def no_body(self):
        """A docstring that is long enough, but there is nothing under it."""
'''


def load(**settings: object) -> EmbeddingTask:
    return load_embeddings(EmbeddingSetup.make(**settings))


def test_documented_code_is_docstring_and_body() -> None:
    whole, method = pairs_of(SOURCE, "reader")
    assert whole.query.startswith("Reads the records") and "Return the first line" in whole.code
    assert method.query.startswith("Return the first line") and method.line == 5
    assert "open(path)" in method.code and "Return" not in method.code and "def" not in method.code


def test_texts_that_repeat_are_left_out() -> None:
    code = "with open(path) as opened: return opened.readline().rstrip() or default value"
    pairs = [
        Function("a", 1, "first text", code),
        Function("b", 1, "second text", code),  # the same code
        Function(
            "c", 1, "First  Text", "for number in range(ten): print(number, other, third, fourth)"
        ),  # the same text
        Function("d", 1, "third text", "while queue: queue.pop().run(with_some=arguments, and_more=of_them)"),
    ]
    assert [p.module for p in distinct_pairs(pairs)] == ["a", "d"]
    assert word_pieces("getHTTPResponse_2\u02d1 \u02d1") == ["get", "http", "response", "2"]


@pytest.mark.parametrize("task", ["digits-halves", "digits-contrastive", "cones"])
def test_parts_have_their_sizes_and_unit_rows(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_sources.contrastive_digits, "__defaults__", (5,))  # steps
    made = load(task=task, train_size=60, val_size=20, test_size=30, split_seed=3)
    for part, size in ((made.train, 60), (made.val, 20), (made.test, 30)):
        assert part.query.shape[0] == part.gallery.shape[0] == size == len(part)
        torch.testing.assert_close(part.gallery.norm(dim=1), torch.ones(size))
        torch.testing.assert_close(part.query.norm(dim=1), torch.ones(size))
    again = load(task=task, train_size=60, val_size=20, test_size=30, split_seed=3)
    assert torch.equal(again.test.query, made.test.query) and again.fingerprint == made.fingerprint
    assert load(task=task, train_size=60, val_size=20, test_size=30).fingerprint != made.fingerprint
    about = made.describe()
    assert about["bank"] == [60, 60] and about["name"] == task and made.class_names is None
    batch = made.train.fetch(torch.arange(4), None)
    assert batch.inputs.shape[0] == 4 and batch.labels is not None and batch.labels.tolist() == [0, 1, 2, 3]


def test_parts_are_disjoint() -> None:
    parts = split_rows(50, (20, 10, 15), 1)
    assert len(torch.cat(parts).unique()) == 45
    with pytest.raises(InputError, match="50 pairs, fewer than 30 \\+ 10 \\+ 15"):
        split_rows(50, (30, 10, 15), 1)


def test_texts_are_embedded_by_what_the_bank_knows() -> None:
    generator = np.random.default_rng(0)
    words = [f"word{chr(97 + n)}" for n in range(20)]
    pairs = []
    for n in range(40):
        own = generator.choice(words, 5, replace=False)
        pairs.append(Function("m", n, " ".join(own), " ".join(generator.permutation(own))))
    (bank, _, test) = text_pairs(pairs, (20, 10, 10), 8, seed=0)
    torch.testing.assert_close(test[0], test[1])  # the same words in another order
    assert bank[0].shape == (20, 8)
    changed = [*pairs]
    for n in split_rows(40, (20, 10, 10), 0)[2].tolist():  # other texts for testing change nothing for the bank
        changed[n] = Function("m", n, "nothing known here", "nothing known here")
    other = text_pairs(changed, (20, 10, 10), 8, seed=0)
    torch.testing.assert_close(other[0][0], bank[0])
    assert bool((other[2][0] == 0).all())  # nothing of it is known
    with pytest.raises(InputError, match="no words in common"):
        text_pairs([Function("m", n, f"q{'x' * n}", f"c{'y' * n}") for n in range(6)], (2, 2, 2), 4, seed=0)


def test_a_cone_is_as_narrow_as_it_was_asked_for() -> None:
    means = [load(task="cones", cone=cone).describe()["bank_mean_cosine"] for cone in (0.0, 1.0, 3.0)]
    assert abs(means[0]) < 0.03 and means[0] < means[1] < means[2] and means[2] > 0.6


def test_own_arrays(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    query, gallery = generator.normal(size=(2, 50, 6)).astype(np.float16)
    np.savez(tmp_path / "own.npz", query=query, gallery=gallery)
    made = load(data=str(tmp_path / "own.npz"), val_size=5)
    assert (len(made.train), len(made.val), len(made.test)) == (30, 5, 10) and made.name == "own"
    assert made.train.gallery.dtype == torch.float16
    for name, rows in (("query", query), ("gallery", gallery)):
        np.save(tmp_path / f"{name}.npy", rows)
    mapped = load(data=str(tmp_path), val_size=5)
    assert torch.equal(mapped.test.query, made.test.query)
    ids = {"test_query_ids": np.array([7, 8, 7]), "test_gallery_ids": np.array([8, 7])}
    parts = {f"{part}_{side}": query[:4] for part in ("train", "val") for side in ("query", "gallery")}
    parts |= {**ids, "test_query": query[:3], "test_gallery": gallery[:2]}
    np.savez(tmp_path / "split.npz", **parts)
    split = load(data=str(tmp_path / "split.npz"))
    assert split.test.targets is not None and split.test.targets.tolist() == [1, 0, 1]


def test_own_texts(tmp_path: Path) -> None:
    rows = [{"query": f"alpha beta word{n % 7}", "document": f"beta gamma word{n % 7}"} for n in range(30)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = load(data=str(tmp_path / "texts.jsonl"), dimensions=5)
    assert made.train.gallery.shape == (18, 5) and len(made.test) == 6


def test_bad_data_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean cones"):
        load(task="cone")
    with pytest.raises(InputError, match="1797 pairs, fewer than"):
        load(task="digits-halves", train_size=1500)
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read as numpy arrays"):
        load(data=str(tmp_path / "bad.npz"))
    with pytest.raises(InputError, match="holds no embeddings"):
        load(data=str(tmp_path / "none.txt"))
    np.savez(tmp_path / "half.npz", query=np.ones((4, 2)))
    with pytest.raises(InputError, match="lacks train_query, train_gallery"):
        load(data=str(tmp_path / "half.npz"))
    np.savez(tmp_path / "few.npz", query=np.ones((4, 2)), gallery=np.ones((4, 2)))
    with pytest.raises(InputError, match="4 pairs are too few to be split in three"):
        load(data=str(tmp_path / "few.npz"))
    broken = np.ones((5000, 2))
    broken[4500, 1] = np.nan
    np.savez(tmp_path / "nan.npz", query=np.ones((5000, 2)), gallery=broken)
    with pytest.raises(InputError, match=r"gallery of .*nan\.npz holds NaN or infinity \(first in row 4500\)"):
        load(data=str(tmp_path / "nan.npz"))
    one = np.ones((4, 2))
    with pytest.raises(InputError, match="4 queries and 3 items are no pairs"):
        EmbeddingPairs(one, one[:3])
    with pytest.raises(InputError, match="2 dimensions and the gallery 1"):
        EmbeddingPairs(one, one[:, :1])
    with pytest.raises(InputError, match="query 1 looks for an id"):
        EmbeddingPairs(one, one, [0, 5, 0, 0], [0, 1, 2, 3])
    with pytest.raises(InputError, match="must be 4 integers"):
        EmbeddingPairs(one, one, [0.0, 1, 2, 3])
    with pytest.raises(InputError, match="matrix of numbers"):
        EmbeddingPairs(np.array([["a"]]), one)


# ---- judging ---------------------------------------------------------------------------------------------------------


def test_rivals_are_tuned_on_validation_pairs() -> None:
    made = load(task="cones", train_size=60, val_size=40, test_size=40, cone=2.0)
    rival = Rival("", RIVALS["centred"].index, {"strength_gallery": (0.0, 1.0), "strength_query": (0.0, 1.0)})
    best = tuned(rival, made.train, made.val)
    scores = {
        (a, b): objective(ranks_of(norms_of(made.train, made.val.gallery).centred(a, b), made.val))
        for a in (0.0, 1.0)
        for b in (0.0, 1.0)
    }
    assert tuple(best.values()) == max(scores, key=scores.__getitem__)
    assert all(len(r.candidates()) >= 147 for name, r in RIVALS.items() if name != "raw")
    assert len(RIVALS["db-norm"].candidates(10)) == 10 and RIVALS["raw"].candidates(0) == [{}]


def test_a_row_says_how_narrow_the_gallery_is_where_that_can_be_said() -> None:
    made = load(task="cones", train_size=60, val_size=40, test_size=40)
    norms = norms_of(made.train, made.test.gallery)
    row = judged("raw", norms.plain(), made.test, before=made.test.gallery)
    assert row["shift"] == pytest.approx(0, abs=1e-6)
    assert row["mean_cosine"] == pytest.approx(shape_of(made.test).mean_cosine)
    corrected = judged("is", norms.inverted_softmax(20.0), made.test)
    assert corrected.keys() >= {"recall_at_1", "recall_at_5", "recall_at_10", "median_rank", "mean_rank"}
    assert "mean_cosine" not in corrected
