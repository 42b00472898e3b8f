"""InvGC as an estimator, as a run by name, and as an artifact."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

from limbeck.blocks.inverse_convolution import inverse_convolution
from limbeck.core.artifacts import load
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError, RunError
from limbeck.methods.structures.invgc import InvGC, InvGCMethod
from limbeck.metrics.degeneration import hubness
from limbeck.tasks.embeddings import EmbeddingPairs, EmbeddingSetup, load_embeddings
from limbeck.tasks.judging_embeddings import objective, ranks_of
from tests.helpers import Stopped, _crash_after, lines

torch.set_num_threads(1)
SETUP: dict[str, Any] = {"task": "cones", "train_size": 80, "val_size": 40, "test_size": 50, "cone": 2.0}
SMALL: dict[str, Any] = {
    "strengths_gallery": (0.0, 1.0),
    "strengths_query": (0.0, 4.0),
    "neighbour_shares": (0.0, 0.1, 0.5),
}


@parametrize_with_checks([InvGC(), InvGC(k=0.1, r_query=0.5), InvGC(k=1, skip_copies=True)])
def test_scikit_learn_finds_nothing_wrong(estimator: Any, check: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


def on() -> Any:
    return load_embeddings(EmbeddingSetup.make(**SETUP))


def test_it_is_the_transform_of_both_banks() -> None:
    task = on()
    bank, gallery = task.train, task.test.gallery
    for k in (None, 5, 0.2):
        made = InvGC(0.5, 2.0, k, centre="gallery").fit(bank.gallery, query_bank=bank.query)
        wanted = inverse_convolution(gallery, bank.gallery, bank.query, r_gallery=0.5, r_query=2.0, k=k)
        torch.testing.assert_close(made.transform(gallery), wanted)
    array = made.transform(gallery.numpy())
    assert isinstance(array, np.ndarray) and array.dtype == np.float32
    np.testing.assert_allclose(array, wanted.numpy(), atol=1e-6)


def test_items_may_come_one_by_one() -> None:
    task = on()
    for k in (None, 0.1):
        made = InvGC(k=k).fit(task.train.gallery, query_bank=task.train.query)
        whole = made.transform(task.test.gallery)
        single = torch.cat([made.transform(row[None]) for row in task.test.gallery])
        torch.testing.assert_close(single, whole, atol=1e-6, rtol=0)
    # the banks' centre is near the gallery's, which the published code takes
    here = InvGC(centre="gallery").fit(task.train.gallery, query_bank=task.train.query).transform(task.test.gallery)
    assert (
        float(
            (here - InvGC().fit(task.train.gallery, query_bank=task.train.query).transform(task.test.gallery))
            .norm(dim=1)
            .max()
        )
        < 0.05
    )


def test_it_makes_hubs_rarer_and_finds_more_in_a_cone() -> None:
    task = load_embeddings(EmbeddingSetup.make(task="cones"))
    made = InvGC(0.5, 4.0).fit(task.train.gallery, query_bank=task.train.query)
    before, after = task.test.gallery, made.transform(task.test.gallery)
    assert hubness(task.test.query, after) < 0.7 * hubness(task.test.query, before)
    found = [(ranks_of_gallery(task, g) == 1).float().mean() for g in (before, after)]
    assert found[1] > found[0] + 0.03
    assert made.degeneration_ > 0.2


def ranks_of_gallery(task: Any, gallery: torch.Tensor) -> torch.Tensor:
    from limbeck.blocks.bank_norms import Index

    return ranks_of(Index(gallery), task.test)


def test_selection_is_the_best_of_the_grid_on_validation_pairs() -> None:
    from limbeck.blocks.bank_norms import Index

    task = on()
    bank, val = task.train, task.val
    made = InvGC.select(
        bank.gallery, bank.query, val.gallery, val.query, strengths=(0.0, 1.0, 4.0), neighbours=(None, 0.2)
    )
    tried = {}
    for k in (None, 0.2):
        for a in (0.0, 1.0, 4.0):
            for b in (0.0, 1.0, 4.0):
                gallery = InvGC(a, b, k).fit(bank.gallery, query_bank=bank.query).transform(val.gallery)
                tried[a, b, k] = objective(ranks_of(Index(gallery), val))
    assert len(made.selection_) == len(tried) == 18
    for row in made.selection_:
        assert row["objective"] == pytest.approx(tried[row["r_gallery"], row["r_query"], row["k"]], abs=1e-9)
    assert tried[made.r_gallery, made.r_query, made.k] == pytest.approx(max(tried.values()))
    assert clone(made).get_params() == made.get_params()


def test_it_says_when_help_is_not_expected() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 300, 48, generator=generator)  # no cone, and hardly a hub
    with pytest.warns(UserWarning, match="not expected to help: the mean cosine"):
        InvGC.select(rows[0], rows[1], rows[2], rows[2] + 0.5 * rows[3], strengths=(0.0, 1.0), neighbours=(None,))
    task = on()
    with pytest.warns(UserWarning, match="no strength beats the untouched gallery"):
        InvGC.select(
            task.train.gallery, task.train.query, task.val.gallery, task.val.query, strengths=(0.0,), neighbours=(None,)
        )


def test_ids_say_what_a_query_looks_for() -> None:
    task = on()
    val = task.val
    order = torch.randperm(len(val), generator=torch.Generator().manual_seed(0))
    shuffled = InvGC().fit(task.train.gallery, query_bank=task.train.query)
    plain = shuffled.tried(val, (0.0, 1.0), (1.0,))
    again = shuffled.tried(EmbeddingPairs(val.query, val.gallery[order], None, order), (0.0, 1.0), (1.0,))
    assert [row["objective"] for row in again] == pytest.approx([row["objective"] for row in plain])


def test_bad_input_is_one_clear_line() -> None:
    x = np.random.default_rng(0).normal(size=(9, 4))
    for wrong, message in (
        ({"r_gallery": -1.0}, "r_gallery must be"),
        ({"r_query": float("nan")}, "r_query must be"),
        ({"k": 0}, "k must be between 1"),
        ({"k": 10}, "the bank's 9 rows"),
        ({"centre": "mean"}, "centre must be"),
    ):
        with pytest.raises(InputError, match=message):
            InvGC(**wrong).fit(x)
    with pytest.raises(ValueError, match="NaN"):
        InvGC().fit(np.where(x > 1, np.nan, x))
    with pytest.raises(ValueError, match="4 features"):
        InvGC().fit(x, query_bank=x[:, :3])
    with pytest.raises(InputError, match="3 dimensions, not 4"):
        InvGC().fit(torch.from_numpy(x)).transform(torch.from_numpy(x[:, :3]))
    with pytest.raises(InputError, match="NaN or infinity"):
        InvGC().fit(torch.from_numpy(x)).transform(torch.full((2, 4), torch.nan))
    with pytest.raises(NotFittedError):
        InvGC().transform(x)
    for settings, message in (
        ({"strengths_gallery": (-1.0,)}, "strengths_gallery: give numbers from 0 "),
        ({"neighbour_shares": (0.5, 2.0)}, "neighbour_shares: give numbers from 0 to 1"),
        ({"strengths_query": (float("inf"),)}, "strengths_query: give numbers from 0"),
        ({"strengths_query": ()}, "strengths_query: give numbers"),
        ({"block_rows": (0, 5)}, "block_rows: give numbers from 1"),
    ):
        with pytest.raises(InputError, match=message):
            InvGCMethod(**settings)


# ---- by name ---------------------------------------------------------------------------------------------------------


def method() -> InvGCMethod:
    made, _ = InvGCMethod.build(EmbeddingSetup.make(**SETUP), InvGCMethod.Config.make(**SMALL, rival_candidates=3))
    return made


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path) -> None:
    settings = EngineConfig(progress=False, checkpoint_steps=1, log_every=1)
    whole = method()
    Engine(tmp_path / "whole", settings, seed=3).run(whole, whole.stages(seed=0))
    for stop in (1, 2):
        broken = method()
        stages = broken.stages(seed=0)
        stages[0].after_step = _crash_after(stop, None)
        with pytest.raises(Stopped):
            Engine(tmp_path / "broken", settings, seed=3).run(broken, stages, resume=True)
    resumed = method()
    Engine(tmp_path / "broken", settings, seed=3).run(resumed, resumed.stages(seed=0), resume=True)
    assert resumed.found.rows == whole.found.rows and len(whole.found.rows) == 12
    assert resumed.chosen().get_params() == whole.chosen().get_params()
    assert lines(tmp_path / "whole") == lines(tmp_path / "broken")
    with pytest.raises(InputError, match="nothing was tried yet"):
        method().chosen()


def test_a_run_by_name_judges_draws_and_keeps(tmp_path: Path) -> None:
    import limbeck

    run = limbeck.fit(
        InvGCMethod, out=tmp_path / "run", engine={"progress": False}, **SETUP, **SMALL, rival_candidates=3
    )
    first, *others = run.result["rows"]
    assert first["who"] == "invgc" and [row["who"] for row in others][:2] == ["untouched", "gallery centred"]
    assert first.keys() >= {
        "recall_at_1",
        "recall_at_5",
        "recall_at_10",
        "median_rank",
        "nearest_similarity",
        "hubness",
        "shift",
    }
    assert run.result["help_expected"] == "yes" and len(run.result["pictures"]) == 2
    stored = json.loads((tmp_path / "run" / "artifact" / "artifact.json").read_text())
    made = load(tmp_path / "run")
    assert made.kind == "embedding-transform" and stored["parameters"]["k"] == made.content.k
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "run" / "artifact" / "gallery.safetensors")["gallery"]
    torch.testing.assert_close(made.content.transform(on().test.gallery), kept)
    from limbeck.report.run import write_run_report

    page = write_run_report(tmp_path / "run").read_text()
    assert "Recall against the strength" in page and "Cosines in the test gallery" in page


@pytest.mark.parametrize("k", [None, 3])
def test_a_stored_transform_is_the_same(k: int | None, tmp_path: Path) -> None:
    task = on()
    made = InvGC(0.5, 2.0, k, skip_copies=k is not None).fit(task.train.gallery.numpy(), query_bank=task.train.query)
    made.save(tmp_path)
    again = InvGC.load(tmp_path)
    assert again.get_params() == made.get_params() and again.degeneration_ == made.degeneration_
    torch.testing.assert_close(again.transform(task.test.gallery), made.transform(task.test.gallery))
    alone = InvGC(k=k).fit(task.train.gallery)
    alone.save(tmp_path / "alone")
    torch.testing.assert_close(
        InvGC.load(tmp_path / "alone").transform(task.test.gallery), alone.transform(task.test.gallery)
    )
    (tmp_path / "transform.safetensors").write_bytes(b"no")
    with pytest.raises(RunError, match="damaged or incomplete"):
        InvGC.load(tmp_path)


def test_without_a_run_it_says_what_to_call() -> None:
    with pytest.raises(InputError, match="invgc is an estimator: call its fit"):
        InvGCMethod.from_data(on().train, None, None, None)
