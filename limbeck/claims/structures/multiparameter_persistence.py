"""Do images of two-parameter decompositions tell shapes apart where one parameter does not, and do they move no more than the data?

Clouds: one noisy circle or two smaller ones, 70 points, among 40 outliers; 100 clouds for training, 50 for validation and 150 for testing, drawn
anew for every seed. Both sides get the same clouds, degrees 0 and 1, 400 pixels a degree, a random forest, and the best of four settings by
validation accuracy on tuning seeds. The baseline is the one-parameter persistence images of the Rips filtration; a control has three
one-parameter filtrations side by side (scale, codensity, and the diagonal between them).

Real graphs: MUTAG, and 200 graphs of PROTEINS for each seed (generated molecules where the data is not at hand), filtered by two functions on the
nodes. Five-fold cross-validation; within each fold the best of four settings is chosen on a quarter of its training part. The baseline has the
persistence images of both functions side by side, and the same folds and choices.

Three measurements have bounds in the place of a baseline. Stability: all points of a cloud are moved by a distance e in random directions; the
supremum of the change of the image (degree 1, delta 0.15, p = 0, 1 and infinity; medians of draws and clouds) is fitted by a power of e. Convergence: the mean distance of the
image of n points of a circle with outliers to that of 400. Equality: the images of this library and of multipers on the same module.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from limbeck.blocks.decomposer import Decomposer
from limbeck.blocks.decomposition_images import DecompositionTransformer
from limbeck.blocks.filtration_builder import FiltrationBuilder
from limbeck.blocks.interval_summands import IntervalSummands
from limbeck.blocks.module_approximation import decompose, simplex_tree
from limbeck.blocks.multifiltrations import Multifiltration, function_rips
from limbeck.blocks.persistence_images import Barcodes, PersistenceImages
from limbeck.blocks.summand_images import represent
from limbeck.blocks.vertex_functions import codensity
from limbeck.claims.base import Arm, Check, Claim, Outcome
from limbeck.core.data import mix_seed
from limbeck.core.graphs import GraphData
from limbeck.metrics.decompositions import bottleneck_distance
from limbeck.tasks.base import TaskConfig
from limbeck.tasks.base import data_root as folder_of
from limbeck.tasks.graphs import molecules, read_tu
from limbeck.tasks.point_clouds import circles, ring_among_outliers

Floats = NDArray[np.float64]
Split = dict[str, Any]
SIZES = {"train": 100, "val": 50, "test": 150}
TREES = 100
GRAPHS = 200  # of PROTEINS and of the generated molecules, for each seed
FUNCTIONS = (("degree", "hks"), ("curvature", "hks-10"))
POWERS, BANDWIDTHS = (0.0, 1.0), (0.05, 0.1)
CANDIDATES = tuple({"power": p, "bandwidth": b} for p in POWERS for b in BANDWIDTHS)
EPS, DELTA = (1e-3, 3e-3, 1e-2, 3e-2), 0.15
STABLE = {"0": 0.0, "1": 1.0, "inf": math.inf}  # powers by name
COUNTS = (25, 50, 100, 200)
BOUNDS = {
    "slope_error": 0.2,
    "mean_slope_error": 0.2,
    "change_ratio": 2.0,
    "worst_ratio": 2.0,
    "share_of_bound": 1.0,
    "halvings": 2.0,
    "worst_step": 0.0,
    "difference": 1e-8,
}


def claim(data_root: str | None = None) -> Claim:
    """Generated clouds; MUTAG and PROTEINS, or generated molecules."""
    root = folder_of(TaskConfig.make(data_root=data_root))
    names = [n for n in ("MUTAG", "PROTEINS") if root is not None and (root / "tu" / n).is_dir()]
    where: dict[str, str | None] = {n.lower(): str(Path(str(root)) / "tu" / n) for n in names} or {"molecules": None}
    arms = {
        "s-cdr": Arm("method", "decompositions by scale and codensity", on_clouds("s-cdr"), CANDIDATES),
        "rips": Arm("baseline", "persistence images of the Rips filtration", on_clouds("rips"), CANDIDATES),
        "three filtrations": Arm(
            "control",
            "persistence images by scale, by codensity and by both on a diagonal",
            on_clouds("three"),
            CANDIDATES,
        ),
        "stability": Arm("control", "change of the images when all points move", stability),
        "convergence": Arm("control", "distance of the image of n points to that of 400", convergence),
        "bounds": Arm("control", "what the three before are held against", lambda chosen, seed: Outcome({}, BOUNDS)),
    }
    checks = [
        Check(
            "among outliers it is right for 5 points more of the clouds than Rips persistence images",
            "s-cdr",
            "rips",
            "accuracy",
            margin=0.05,
        ),
        _bound(
            "the change is proportional to the points' movement: an exponent in [0.8, 1.2]", "stability", "slope_error"
        ),
        _bound(
            "it is so in the mean too, jumps of decompositions included",
            "stability",
            "mean_slope_error",
            headline=False,
        ),
        _bound("for p = infinity it is at most 2 e / delta", "stability", "change_ratio"),
        _bound("it is so in every single draw", "stability", "worst_ratio", headline=False),
        _bound("it is at most the bottleneck distance of the decompositions over delta", "stability", "share_of_bound"),
        Check(
            "the mean error is halved at least twice from 25 to 200 points",
            "convergence",
            "bounds",
            "halvings",
        ),
        Check("the mean error falls with every doubling", "convergence", "bounds", "worst_step", headline=False),
        Check(
            "it is better than three one-parameter filtrations together",
            "s-cdr",
            "three filtrations",
            "accuracy",
            headline=False,
        ),
    ]
    if importlib.util.find_spec("multipers") is not None:
        arms["equality"] = Arm("control", "largest difference to multipers' own images", equality)
        checks.append(_bound("images equal those of multipers to 1e-8", "equality", "difference"))
    for name, folder in where.items():
        arms[name] = Arm("method", f"{name}: decompositions by two functions", on_graphs(folder, "s-cdr"))
        rival = f"{name}, one parameter"
        arms[rival] = Arm("baseline", f"{name}: persistence images of both functions", on_graphs(folder, "images"))
        first = name in ("mutag", "molecules")
        checks.append(
            Check(
                f"on {name} it is right as often as one-parameter images of the same functions, up to a point",
                name,
                rival,
                "accuracy",
                margin=-0.01,
                headline=first,
            )
        )
        checks.append(Check(f"on {name} it is right more often", name, rival, "accuracy", headline=False))
    return Claim(
        name="multiparameter-persistence",
        arms=arms,
        checks=checks,
        data={
            "name": "circles among outliers",
            "graphs": list(where),
            "source": "seeded generators, TU Dortmund",
            "sizes": SIZES,
        },
        seeds=5,
        note=note,
        settings={
            "classifier": f"random forest of {TREES} trees",
            "lines": 120,
            "resolution": 20,
            "powers": list(POWERS),
            "bandwidths": list(BANDWIDTHS),
            "functions": [list(f) for f in FUNCTIONS],
            "eps": list(EPS),
            "delta": DELTA,
            "points": list(COUNTS),
        },
    )


def _bound(statement: str, arm: str, metric: str, *, headline: bool = True) -> Check:
    return Check(statement, arm, "bounds", metric, higher_is_better=False, headline=headline)


def note(result: Mapping[str, Any]) -> str:
    """The measured exponents and errors, in words."""

    def mean(arm: str, metric: str) -> float:
        values = result["arms"][arm]["metrics"][metric]
        return sum(values) / len(values)

    slopes = ", ".join(f"{mean('stability', f'slope_{p}'):.2f}" for p in STABLE)
    errors = ", ".join(f"{mean('convergence', f'error_{n}'):.3f}" for n in COUNTS)
    worst = max(result["arms"]["stability"]["metrics"]["worst_ratio"])
    return (
        f"Exponents for p = 0, 1, infinity: {slopes}; the largest change in any draw was {worst:.1f} e / delta (p = infinity), "
        f"and in {100 * mean('stability', 'jumps'):.0f} % of the draws bars that nearly meet exchanged their ways, so that the decomposition jumped. Mean errors (p = infinity) with {', '.join(map(str, COUNTS))} points: {errors}. "
        "PROTEINS is a sample of 200 graphs a seed; series and tissue images of the paper were not run."
    )


# ---- clouds ------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def _clouds(seed: int) -> tuple[dict[str, list[Multifiltration]], dict[str, NDArray[np.int64]]]:
    drawn = {part: circles(size, seed=mix_seed(seed, n)) for n, (part, size) in enumerate(SIZES.items())}
    builder = FiltrationBuilder().fit(drawn["train"][0])
    return {p: builder.transform(x) for p, (x, _) in drawn.items()}, {p: y for p, (_, y) in drawn.items()}


@functools.lru_cache(maxsize=6)
def _prepared(kind: str, seed: int) -> dict[str, list[Any]]:
    """What each side's images are made of, by part."""
    filtrations, _ = _clouds(seed)
    if kind == "s-cdr":
        made: Any = Decomposer()
    else:
        made = Barcodes(slices=(0,) if kind == "rips" else (0, 1, "diagonal"))
    made.fit(filtrations["train"])
    return {part: made.transform(found) for part, found in filtrations.items()}


def on_clouds(kind: str) -> Callable[[Mapping[str, Any], int], Outcome]:
    """An arm on generated clouds."""

    def train(chosen: Mapping[str, Any], seed: int) -> Outcome:
        data, (_, labels) = _prepared(kind, seed), _clouds(seed)
        made = DecompositionTransformer(**chosen) if kind == "s-cdr" else PersistenceImages(**chosen)
        features = {part: made.fit(data["train"]).transform(found) for part, found in data.items()}
        model = _forest(seed).fit(features["train"], labels["train"])
        score = {p: {"accuracy": float(model.score(features[p], labels[p]))} for p in ("val", "test")}
        return Outcome(score["val"], score["test"])

    return train


def _forest(seed: int) -> Any:
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(TREES, random_state=seed)


# ---- graphs ------------------------------------------------------------------------------------------------------------


def _graphs(folder: str | None, seed: int) -> GraphData:
    """All of MUTAG; a stratified sample of what is larger."""
    from sklearn.model_selection import train_test_split

    if folder is None:
        return molecules(GRAPHS, seed=seed)
    found, _ = read_tu(Path(folder))
    if len(found) <= GRAPHS:
        return found
    kept, _ = train_test_split(np.arange(len(found)), train_size=GRAPHS, stratify=found.y.numpy(), random_state=seed)
    return found.subset(torch.from_numpy(np.sort(kept)))


def on_graphs(folder: str | None, kind: str) -> Callable[[Mapping[str, Any], int], Outcome]:
    """An arm on graphs: accuracy over five folds, each with a choice of its own."""

    def train(chosen: Mapping[str, Any], seed: int) -> Outcome:
        from sklearn.model_selection import StratifiedKFold, train_test_split

        data = _graphs(folder, seed)
        labels = data.y.numpy()
        right, folds = 0, StratifiedKFold(5, shuffle=True, random_state=seed)
        made = [(_graph_parts(data, functions, kind), p) for functions in FUNCTIONS for p in POWERS]
        for inside, outside in folds.split(labels, labels):
            learn, choose = train_test_split(inside, test_size=0.25, stratify=labels[inside], random_state=seed)

            def score(candidate: tuple[Sequence[Any], float], rows: Any, judged: Any) -> float:
                parts, power = candidate
                maker = DecompositionTransformer(power=power) if kind == "s-cdr" else PersistenceImages(power=power)
                x = maker.fit([parts[i] for i in rows]).transform([parts[i] for i in rows])
                model = _forest(seed).fit(x, labels[rows])
                return float(model.score(maker.transform([parts[i] for i in judged]), labels[judged]))

            best = max(made, key=lambda candidate: score(candidate, learn, choose))
            right += round(score(best, inside, outside) * len(outside))
        return Outcome({}, {"accuracy": right / len(labels)})

    return train


def _graph_parts(data: GraphData, functions: Sequence[str], kind: str) -> list[Any]:
    """Decompositions or barcodes of all graphs. The range of the functions is taken from all of them, labels aside: it only sets units."""
    builder = FiltrationBuilder("graph", dimension=1, functions=functions).fit(data)
    filtrations = builder.transform(data)
    made: Any = Decomposer() if kind == "s-cdr" else Barcodes(slices=(0, 1))
    return list(made.fit(filtrations).transform(filtrations))


# ---- measurements with bounds ------------------------------------------------------------------------------------------


def _module(points: Floats, bandwidth: float, threshold: float, box: Any, lines: int) -> IntervalSummands:
    filtration = function_rips(points, codensity(points, bandwidth), threshold=threshold)
    return decompose(filtration, degrees=(1,), lines=lines, box=box)


def _image(module: IntervalSummands, box: Any, power: float, delta: float) -> Floats:
    axes = [np.linspace(low, high, 30) for low, high in zip(*box, strict=True)]
    found: Floats = represent(module, axes, bandwidth=delta, power=power, box=box).numpy()
    return found


def stability(chosen: Mapping[str, Any], seed: int) -> Outcome:
    """Three clouds of 60 points on a circle and 15 outliers, each moved five times by every e.

    The change for an e is the median over clouds and draws: now and then two bars that nearly meet exchange their ways along the lines, and with them the
    decomposition jumps, which is what the image is stable in. ``jumps`` is the share of draws in which it moved by more than 10 e (bottleneck distance);
    ``mean_slope_error`` has the mean in the place of the median, ``worst_ratio`` is over all draws.
    """
    rng = np.random.default_rng(mix_seed(seed, 41))
    changes = {name: np.zeros((3, len(EPS), 5)) for name in STABLE}
    apart = np.zeros((3, len(EPS), 5))
    for number in range(3):
        points = ring_among_outliers(60, 15, 0.08, mix_seed(seed, number))
        heights = codensity(points, 0.2)
        box = ([0.0, float(heights.min()) - 0.2], [1.0, float(heights.max()) + 0.2])
        still = _module(points, 0.2, 1.0, box, 400)
        before = {name: _image(still, box, p, DELTA) for name, p in STABLE.items()}
        for at, draw in np.ndindex(len(EPS), 5):
            direction = rng.normal(size=points.shape)
            moved = points + EPS[at] * direction / np.linalg.norm(direction, axis=1, keepdims=True)
            module = _module(moved, 0.2, 1.0, box, 400)
            for name, p in STABLE.items():
                changes[name][number, at, draw] = np.abs(_image(module, box, p, DELTA) - before[name]).max()
            apart[number, at, draw] = bottleneck_distance(still, module)
    usual = {name: np.median(c, axis=(0, 2)) for name, c in changes.items()}
    slopes = {f"slope_{name}": _exponent(c) for name, c in usual.items()}
    found = {
        "slope_error": max(abs(s - 1) for s in slopes.values()),
        "mean_slope_error": max(abs(_exponent(c.mean((0, 2))) - 1) for c in changes.values()),
        "change_ratio": float((usual["inf"] * DELTA / EPS).max()),
        "worst_ratio": float((changes["inf"].max((0, 2)) * DELTA / EPS).max()),
        "share_of_bound": float((changes["inf"] * DELTA / np.minimum(apart, DELTA)).max()),
        "jumps": float((apart > 10 * np.array(EPS)[:, None]).mean()),
    }
    return Outcome({}, {**found, **slopes})


def _exponent(changes: Floats) -> float:
    """Of the power of e that fits the changes for all e."""
    return float(np.polyfit(np.log(EPS), np.log(changes), 1)[0])


def convergence(chosen: Mapping[str, Any], seed: int) -> Outcome:
    """p = infinity, and 1 for the record; eight draws for each n; the box holds the values of the three largest samples."""

    def draw(count: int, number: int) -> Floats:
        return ring_among_outliers(count, count // 8, 0.08, mix_seed(seed, count, number))

    large = [draw(400, n) for n in range(3)]
    heights = torch.cat([codensity(x, 0.2) for x in large])
    box = ([0.0, float(heights.min())], [0.9, float(heights.max())])

    def images(points: Floats) -> Floats:
        module = _module(points, 0.2, 0.9, box, 200)
        return np.stack([_image(module, box, p, DELTA) for p in (math.inf, 1.0)])

    limit = np.mean([images(x) for x in large], 0)
    apart = np.array([[np.abs(images(draw(n, k)) - limit).mean((1, 2)) for k in range(8)] for n in COUNTS])
    errors = apart.mean(1)  # (counts, powers)
    steps = np.log2(errors[:-1]) - np.log2(errors[1:])
    halvings, halvings_1 = steps.sum(0)
    known = {f"error_{n}": float(e) for n, e in zip(COUNTS, errors[:, 0], strict=True)}
    return Outcome(
        {},
        {
            "halvings": float(halvings),
            "worst_step": float(steps[:, 0].min()),
            "halvings_1": float(halvings_1),
            **known,
        },
    )


def equality(chosen: Mapping[str, Any], seed: int) -> Outcome:
    """Degrees 0 and 1, p = 0, 1, 2 and infinity, sums and means, on one cloud."""
    import multipers

    points = circles(1, seed=seed)[0][0]
    filtration = function_rips(points, codensity(points, 0.2), threshold=0.9)
    box = filtration.bounds()
    axes = [np.linspace(box[0][k], box[1][k], number) for k, number in enumerate((17, 13))]
    module = multipers.module_approximation(simplex_tree(filtration, 2), box=np.array(box), nlines=200, n_jobs=1)
    summands = decompose(filtration, lines=200, box=box)
    worst = 0.0
    for degree in (0, 1):
        for power in (0, 1, 2, np.inf):
            for mean in (False, True):
                theirs = module.representation(
                    [degree], bandwidth=0.1, p=power, kernel="linear", normalize=mean, grid=axes, flatten=True
                )
                own = represent(
                    summands.of_degree(degree),
                    axes,
                    bandwidth=0.1,
                    power=power,
                    normalise=mean,
                    box=box,
                )
                other = np.asarray(theirs).reshape(own.shape, order="F")  # their first parameter varies fastest
                worst = max(worst, float(np.abs(own.numpy() - other).max()))
    return Outcome({}, {"difference": worst})
