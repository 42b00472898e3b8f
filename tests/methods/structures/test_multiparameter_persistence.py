"""The estimators (by scikit-learn's own checks), and the run by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from limbeck.blocks.decomposer import Decomposer
from limbeck.blocks.decomposition_images import DecompositionTransformer
from limbeck.blocks.filtration_builder import FiltrationBuilder, delay_embedding
from limbeck.blocks.interval_summands import IntervalSummands
from limbeck.blocks.multifiltrations import graph_lower_star
from limbeck.blocks.persistence_images import Barcodes, PersistenceImages, cut
from limbeck.blocks.summand_images import represent
from limbeck.core import artifacts
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError, RunError, UnknownNameError
from limbeck.core.graphs import Graph, GraphData
from limbeck.methods.structures.multiparameter_persistence import (
    MultiparameterPersistence,
    MultiparameterRepresentation,
)
from limbeck.tasks.point_clouds import circles
from tests.helpers import Stopped, lines

torch.set_num_threads(1)
SMALL: dict = {"lines": 3, "resolution": 3, "backend": "fibered"}
TINY = {"task": "circles", "train_size": 8, "held_size": 4, "circle_points": 12, "outliers": 2}
CONFIG = {
    "lines": 6,
    "resolution": 5,
    "backend": "fibered",
    "chunk": 5,
    "threshold": 0.5,
    "classifier": "svm",
    "powers": (1.0,),
}


# Only MultiparameterRepresentation goes from arrays to arrays, which these checks need: the parts of its chain hand filtrations,
# decompositions and barcodes to each other. Rows of a table are series, hence 1 feature is too few (an error, as a check wants it).
@parametrize_with_checks([MultiparameterRepresentation(**SMALL, degrees=(0,))])
def test_scikit_learn_agrees(estimator, check) -> None:
    check(estimator)


@pytest.fixture(scope="module")
def clouds() -> tuple[np.ndarray, np.ndarray]:
    return circles(12, points=16, outliers=3, seed=1)


def decomposition(rng: np.random.Generator, count: int = 4, shift: float = 0.0) -> IntervalSummands:
    births = rng.uniform(0, 1, (count, 2)) + shift
    return IntervalSummands.of([(b, b + rng.uniform(0.1, 1, 2)) for b in births], rng.integers(0, 2, count).tolist())


# ---- the chain ---------------------------------------------------------------------------------------------------------


def test_the_chain_is_the_sum_of_its_parts(clouds) -> None:
    x, _ = clouds
    whole = MultiparameterRepresentation(**SMALL)
    found = whole.fit_transform(x)
    assert found.shape == (12, 2 * 9) and np.array_equal(found, whole.transform(x))
    parts = make_pipeline(
        FiltrationBuilder(dimension=2), Decomposer(lines=3, backend="fibered"), DecompositionTransformer(resolution=3)
    )
    assert np.array_equal(parts.fit_transform(x), found)
    assert len(whole.get_feature_names_out()) == 18
    as_list = [c[: 15 + i % 3] for i, c in enumerate(x)]  # clouds of several lengths
    assert MultiparameterRepresentation(**SMALL).fit_transform(as_list).shape == (12, 18)


def test_nothing_is_learnt_from_other_than_training_samples(clouds) -> None:
    x, _ = clouds
    fitted = MultiparameterRepresentation(**SMALL).fit(x[:6])
    alone, among = fitted.transform(x[6:7]), fitted.transform(np.concatenate([x[6:], 50 * x[:2]]))
    assert np.array_equal(alone[0], among[0])
    boxes = fitted.images_.boxes_.copy()
    fitted.transform(50 * x)
    assert np.array_equal(fitted.images_.boxes_, boxes)


def test_it_is_found_by_a_grid_search(clouds) -> None:
    x, y = clouds
    model = make_pipeline(MultiparameterRepresentation(**SMALL), LogisticRegression())
    search = GridSearchCV(model, {"multiparameterrepresentation__power": [0.0, np.inf]}, cv=2).fit(x, y)
    assert set(search.best_params_) == {"multiparameterrepresentation__power"} and 0 <= search.best_score_ <= 1


def test_moving_and_scaling_all_clouds_changes_nothing(clouds) -> None:
    x, _ = clouds
    model = MultiparameterRepresentation(**SMALL, degrees=(1,), threshold=0.6)
    first, *others = (model.fit_transform(z) for z in (x, 7 * x + 100, x[:, ::-1]))
    assert first.max() > 0.01 and all(np.allclose(first, other, atol=1e-9) for other in others)


# ---- its parts ---------------------------------------------------------------------------------------------------------


def test_boxes_are_those_of_the_training_corners() -> None:
    rng = np.random.default_rng(0)
    modules = [decomposition(rng) for _ in range(6)]
    made = DecompositionTransformer(resolution=4).fit(modules)
    for d in (0, 1):
        ends = [m.of_degree(d).bounds() for m in modules if len(m.of_degree(d))]
        assert np.allclose(made.boxes_[d, 0], np.min([low.numpy() for low, _ in ends], 0))
        assert np.allclose(made.boxes_[d, 1], np.max([high.numpy() for _, high in ends], 0))
    images = clone(made).set_params(flatten=False).fit(modules).transform(modules)
    box = made.boxes_[1]
    by_hand = represent(
        modules[2].of_degree(1).rescaled((box[0], box[1])), [np.linspace(0, 1, 4)] * 2, bandwidth=0.05, power=1
    )
    assert np.allclose(images[2, 1], by_hand.numpy())
    trimmed = DecompositionTransformer(quantile=0.2).fit(modules)
    assert (trimmed.boxes_[:, 0] >= made.boxes_[:, 0]).all() and (trimmed.boxes_[:, 1] <= made.boxes_[:, 1]).all()
    fixed = DecompositionTransformer(box=[[0, 0], [2, 2]], normalise=False, resolution=3).fit(modules)
    assert fixed.boxes_.tolist() == [[[0, 0], [2, 2]]] * 2


def test_a_degree_without_summands_gives_zeros() -> None:
    modules = [decomposition(np.random.default_rng(i)) for i in range(3)]
    found = DecompositionTransformer(degrees=(0, 7), resolution=3, flatten=False).fit(modules).transform(modules)
    assert found[:, 0].any() and not found[:, 1].any()


def test_decompositions_are_kept_on_disk(clouds, tmp_path, monkeypatch) -> None:
    filtrations = FiltrationBuilder().fit(clouds[0]).transform(clouds[0][:3])
    made = Decomposer(lines=3, backend="fibered", store=tmp_path)
    first = made.transform(filtrations)
    assert len(list(tmp_path.glob("*.npz"))) == 3
    monkeypatch.setattr("limbeck.blocks.decomposer.decompose", lambda *a, **k: pytest.fail("computed again"))
    second = made.transform(filtrations)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.births, b.births) and torch.equal(a.deaths, b.deaths)
    with pytest.raises(pytest.fail.Exception):
        clone(made).set_params(lines=5).transform(filtrations)


def test_series_become_delay_vectors() -> None:
    assert delay_embedding(np.arange(5.0), 2, 2).tolist() == [[0, 2], [1, 3], [2, 4]]
    filtrations = FiltrationBuilder(delay_dimension=3).fit(np.arange(24.0).reshape(4, 6)).transform(np.eye(6))
    assert len(filtrations) == 6 and len(filtrations[0].cells[0]) == 4


def test_graphs_and_images_go_in() -> None:
    ring = Graph([0] * 5, [[0, 1, 2, 3, 4], [1, 2, 3, 4, 0]], 0)
    path = Graph([0] * 4, [[0, 1, 2], [1, 2, 3]], 1)
    data = GraphData.of([ring, path])
    model = MultiparameterRepresentation("graph", **SMALL, functions=("degree", "hks-2", "curvature")[:2])
    assert model.fit_transform(data).shape == (2, 18)
    learned = FiltrationBuilder("graph", dimension=1, functions=("degree", lambda g: np.arange(len(g.node_labels))))
    heights = learned.fit(data).transform([path])[0].values[0]
    assert np.allclose(heights[:, 1], np.arange(4) / 4)  # the training set's largest is 4
    images = np.random.default_rng(0).uniform(size=(3, 2, 4, 4))
    assert MultiparameterRepresentation("image", **SMALL).fit_transform(images).shape == (3, 18)
    own = MultiparameterRepresentation(
        lambda n: graph_lower_star(n, [[0], [1]], np.stack([np.arange(n), -np.arange(n)], 1)), **SMALL
    )
    assert own.fit_transform([3, 4, 5]).shape == (3, 18)


def test_persistence_images_are_gaussians_at_bars() -> None:
    cycle = graph_lower_star(3, [[0, 1, 2], [1, 2, 0]], np.array([[0.0, 5.0], [1.0, 4.0], [2.0, 3.0]]))
    assert [c.tolist() for c in cut(cycle, "diagonal")] == [[5, 4, 3], [5, 5, 4]]
    bars = Barcodes((0, 1), slices=(0, 1)).fit([cycle]).transform([cycle])
    assert bars[0][0][0].tolist() == [[0.0, 2.0]] and len(bars[0][0][1]) == 0  # cut where the last value is
    image = PersistenceImages(resolution=11, bandwidth=0.1).fit(bars).transform(bars)
    assert image.shape == (1, 4 * 121)
    peak = np.unravel_index(image[0, :121].argmax(), (11, 11))
    assert set(peak) == {0, 10}  # least birth, longest bar
    with pytest.raises(InputError, match="no parameter 2"):
        cut(cycle, 2)
    assert not PersistenceImages().fit(bars).transform([[[np.zeros((0, 2))] * 2] * 2]).any()
    with pytest.raises(UnknownNameError, match="diagonal"):
        cut(cycle, "diagnal")  # type: ignore[arg-type]


def test_persistence_images_are_those_of_gudhi() -> None:
    representations = pytest.importorskip("gudhi.representations")
    births = np.random.default_rng(0).uniform(0, 1, 9)
    bars = np.column_stack([births, births + np.random.default_rng(1).uniform(0.1, 1, 9)])
    births[0], births[1], bars[2] = 0.0, 1.0, [0.5, 1.5]
    bars[:2, 0], bars[:2, 1] = births[:2], births[:2] + 0.4  # births fill [0, 1], lengths reach 1
    own = PersistenceImages(bandwidth=0.1, power=2.0, resolution=7).fit([[[bars]]]).transform([[[bars]]])
    theirs = representations.PersistenceImage(
        bandwidth=0.1, weight=lambda point: point[1] ** 2, resolution=[7, 7], im_range=[0, 1, 0, 1]
    )
    np.testing.assert_allclose(own, theirs.fit_transform([bars]), rtol=1e-12)


def test_bad_data_gives_one_clear_line(clouds) -> None:
    x, _ = clouds
    broken = x.copy()
    broken[1, 0, 0] = np.nan
    for estimator, data, message in (
        (MultiparameterRepresentation(), broken, "cloud 1 holds NaN"),
        (MultiparameterRepresentation(), x[:0], "0 samples"),
        (MultiparameterRepresentation("graph"), [3], "int is no graph"),
        (MultiparameterRepresentation("graph", functions=()), [Graph([0], [[], []])], "at least one function"),
        (MultiparameterRepresentation("image"), x, r"must be \(samples, parameters, height, width\)"),
        (MultiparameterRepresentation(), np.ones((3, 1)), "n_features=1"),
        (DecompositionTransformer(), [x], "put a Decomposer before"),
        (DecompositionTransformer(quantile=0.7), [IntervalSummands.empty(2)], "quantile must be"),
        (PersistenceImages(bandwidth=0), [[[np.zeros((0, 2))]]], "bandwidth must be above 0"),
    ):
        with pytest.raises(InputError, match=message):
            estimator.fit(data)
    with pytest.raises(InputError, match="put a FiltrationBuilder before"):
        Decomposer().transform([x])
    with pytest.raises(UnknownNameError, match="did you mean image"):
        MultiparameterRepresentation("imag").fit(x)
    for settings, message in (
        ({"powers": ()}, "powers: needs at least one entry"),
        ({"powers": (1.0, -1.0)}, "powers: must all be at least 0"),
        ({"degrees": (-1,)}, "degrees: must all be at least 0"),
        ({"bandwidths": (0.0,)}, "bandwidths: must all be above 0"),
    ):
        with pytest.raises(InputError, match=message):
            MultiparameterPersistence(**settings)


# ---- the run by name ---------------------------------------------------------------------------------------------------


def run(folder, *, stop: int | None = None, resume: bool = False):
    setup = MultiparameterPersistence.Setup.make(**TINY)
    method, task = MultiparameterPersistence.build(setup, MultiparameterPersistence.Config.make(**CONFIG))
    stages = method.stages(task.train, task.val)

    def crash(step: int) -> None:
        if step == stop:
            raise Stopped

    stages[0].after_step = crash
    Engine(folder, EngineConfig(progress=False, checkpoint_steps=1, log_every=1), seed=0).run(
        method, stages, resume=resume
    )
    return method, task


def test_a_run_resumes_judges_and_keeps_its_result(tmp_path) -> None:
    whole, task = run(tmp_path / "whole")
    assert whole.steps() == 3  # 8 + 2 + 4 samples, 5 a step
    with pytest.raises(Stopped):
        run(tmp_path / "broken", stop=2)
    again, _ = run(tmp_path / "broken", resume=True)
    assert lines(tmp_path / "whole") == lines(tmp_path / "broken")
    for a, b in zip(whole.decompositions.found, again.decompositions.found, strict=True):
        assert torch.equal(a.births, b.births)
    ended, _ = run(tmp_path / "broken", resume=True)  # nothing is left to do, and everything is there
    results = [method.evaluate(task.test, task.class_names) for method in (whole, ended)]
    assert results[0]["rows"] == results[1]["rows"]
    mine, rival = results[0]["rows"]
    assert mine["who"] == "multiparameter-persistence" and 0 <= mine["accuracy"] <= 1 and rival["features"] == 50
    assert results[0]["pictures"][0]["png"].startswith("iVBOR")
    whole.save_artifact(tmp_path / "artifact", {"method": whole.name})
    kept = artifacts.load(tmp_path / "artifact").content
    assert kept.features["train"].shape == (8, 50) and kept.labels["test"].tolist() == task.test.labels.tolist()
    assert np.array_equal(kept.transformer.transform(kept.decompositions[:8]), kept.features["train"])
    (tmp_path / "artifact" / "features.npz").write_bytes(b"PK broken")
    with pytest.raises(RunError, match="is damaged"):
        artifacts.load(tmp_path / "artifact")


def test_graphs_run_by_name(tmp_path) -> None:
    setup = MultiparameterPersistence.Setup.make(task="molecules", train_size=12)
    method, task = MultiparameterPersistence.build(setup, MultiparameterPersistence.Config.make(**CONFIG))
    for part in ("train", "val", "test"):
        setattr(task, part, getattr(task, part).subset(torch.arange(12)))
    Engine(None, EngineConfig(progress=False)).run(method, method.stages())
    rows = method.evaluate(task.test, task.class_names)["rows"]
    assert [r["features"] for r in rows] == [50, 100]  # the rival has an image for each of the two functions
    with pytest.raises(UnknownNameError, match="did you mean circles"):
        MultiparameterPersistence.build(MultiparameterPersistence.Setup.make(task="circle"), None)
