"""Representations of multiparameter persistence decompositions (T-CDR, S-CDR), as a scikit-learn transformer."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationInfo, field_validator
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from limbeck.blocks.decomposer import Decomposer, join_summands, split_summands
from limbeck.blocks.decomposition_images import DecompositionTransformer
from limbeck.blocks.filtration_builder import FiltrationBuilder
from limbeck.blocks.interval_summands import IntervalSummands
from limbeck.blocks.module_approximation import Backend
from limbeck.blocks.persistence_images import Barcodes, PersistenceImages
from limbeck.blocks.representation_files import Representations, write_representations
from limbeck.blocks.summand_images import Local
from limbeck.blocks.vertex_functions import Density
from limbeck.core.data import Data, TensorData
from limbeck.core.graphs import GraphData
from limbeck.methods.structures.base import StructureMethod
from limbeck.report.summand_sheets import representation_sheet
from limbeck.tasks.point_clouds import ShapeSetup, load_shapes

Floats = NDArray[np.float64]
PARTS = ("train", "val", "test")
SHOWN = 4  # samples of each class in the picture


class MultiparameterRepresentation(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""Data sets -> fixed-size vectors by multiparameter persistence: filtration, candidate decomposition, stable images.

    .. math:: V_p(M)(x) = \sum_i w(M_i)^p\, \varphi_\delta(M_i)(x), \qquad V_\infty(M)(x) = \max_i \varphi_\delta(M_i)(x),

    with :math:`\varphi_\delta(I)(x)` the longest diagonal of supp(I) within the square of side :math:`2\delta` around x, divided by that
    side, and w(I) the longest diagonal of supp(I) in the box. The map from decompositions to images is Lipschitz for the bottleneck
    distance: :math:`\|V_\infty(M) - V_\infty(M')\|_\infty \le \min(d_B, \delta)/\delta`; for p = 0 with a constant that grows with the number of
    summands. So the mean representation converges as fast as the estimate of the density does. Other parts can be put in the same
    template (:mod:`limbeck.blocks.summand_images`)::

        model = make_pipeline(MultiparameterRepresentation(), RandomForestClassifier())
        model.fit(clouds, labels)

    Args:
        filtration, density, density_bandwidth, threshold, functions, delay_dimension, delay: see
            :class:`~limbeck.blocks.filtration_builder.FiltrationBuilder`, which also says what X may be.
        degrees: of homology.
        lines, backend, store, n_jobs: see :class:`~limbeck.blocks.decomposer.Decomposer`.
        local, power, bandwidth, resolution, mean, quantile: see :class:`DecompositionTransformer`.

    Attributes:
        builder_, decomposer_, images_: the fitted parts.

    Source: "A Framework for Fast and Stable Representations of Multiparameter Persistent Homology Decompositions" (2023).
    """

    def __init__(
        self,
        filtration: Any = "function-rips",
        *,
        degrees: Sequence[int] = (0, 1),
        density: Density = "kde",
        density_bandwidth: float = 0.05,
        threshold: float | None = 0.25,
        functions: Sequence[Any] = ("degree", "hks"),
        delay_dimension: int = 2,
        delay: int = 1,
        lines: int = 120,
        backend: Backend = "auto",
        store: str | Path | None = None,
        n_jobs: int | None = 1,
        local: Local = "linear",
        power: float = 1.0,
        bandwidth: float = 0.05,
        resolution: int = 20,
        mean: bool = False,
        quantile: float = 0.0,
    ) -> None:
        self.filtration = filtration
        self.degrees = degrees
        self.density = density
        self.density_bandwidth = density_bandwidth
        self.threshold = threshold
        self.functions = functions
        self.delay_dimension = delay_dimension
        self.delay = delay
        self.lines = lines
        self.backend = backend
        self.store = store
        self.n_jobs = n_jobs
        self.local = local
        self.power = power
        self.bandwidth = bandwidth
        self.resolution = resolution
        self.mean = mean
        self.quantile = quantile

    def fit(self, X: Any, y: Any = None) -> Self:
        """Learn units, box and normalisation."""
        self.fit_transform(X)
        return self

    def fit_transform(self, X: Any, y: Any = None) -> Floats:
        """As ``fit(X).transform(X)``, with every decomposition computed once."""
        self.builder_, self.decomposer_, self.images_ = (
            self._part(FiltrationBuilder),
            self._part(Decomposer),
            self._part(DecompositionTransformer),
        )
        top = max(self.degrees, default=0) + 1
        self.builder_.set_params(dimension=1 if self.filtration == "graph" else top)
        modules = self.decomposer_.fit_transform(self.builder_.fit_transform(X))
        for name in ("n_features_in_", "feature_names_in_"):
            if hasattr(self.builder_, name):
                setattr(self, name, getattr(self.builder_, name))
        return self.images_.fit(modules).transform(modules)

    def transform(self, X: Any) -> Floats:
        """(samples, degrees * resolution^n) float64."""
        check_is_fitted(self)
        return self.images_.transform(self.decomposer_.transform(self.builder_.transform(X)))

    @property
    def _n_features_out(self) -> int:
        return int(self.images_.n_features_out_)

    def _part(self, cls: Any) -> Any:
        """One of the chain, with those of its settings that this class has too."""
        own = self.get_params(deep=False)
        return cls(**{name: own[name] for name in cls._get_param_names() if name in own})


class MultiparameterPersistence(StructureMethod):
    """Classification of clouds or graphs by multiparameter persistence, beside one-parameter persistence images.

    Every sample's decomposition is computed once, some samples a step. Then the images of each candidate setting (powers x bandwidths)
    feed a classifier that learns from the training part; the candidate that is best on the validation part is judged on the test
    part. One-parameter persistence images go through the same: the same filtrations, degrees, parts, classifier and number of candidates.
    Clouds: of the Rips filtration (scale alone). Graphs: of each vertex function alone, side by side.

    See :class:`MultiparameterRepresentation` for the mathematics and for use on data of one's own.

    Attributes:
        estimator: the chosen :class:`~limbeck.blocks.decomposition_images.DecompositionTransformer`, fitted.

    Source: "A Framework for Fast and Stable Representations of Multiparameter Persistent Homology Decompositions" (2023).
    """

    name = "multiparameter-persistence"

    class Config(StructureMethod.Config):
        degrees: tuple[int, ...] = Field((0, 1), description="homology degrees")
        density: Density = Field(
            "kde", description="codensity of points: kernel density (kde) or distance to measure (dtm)"
        )
        density_bandwidth: float = Field(
            0.05, gt=0, description="kde: bandwidth in units of the clouds' diameter; dtm: share of the points"
        )
        threshold: float | None = Field(
            0.25, gt=0, description="longest edge in units of the clouds' diameter; none: the enclosing radius"
        )
        functions: tuple[str, ...] = Field(
            ("degree", "hks"), description="functions on a graph's nodes: degree, hks, hks-T, curvature"
        )
        lines: int = Field(120, ge=2, description="diagonal lines that barcodes are followed along")
        local: Local = Field("linear", description="phi: what a summand draws around each pixel")
        powers: tuple[float, ...] = Field(
            (0.0, 1.0), description="candidates for the power p of the weights; inf takes the largest summand"
        )
        bandwidths: tuple[float, ...] = Field((0.05, 0.1), description="candidates for delta, as a share of the box")
        resolution: int = Field(20, ge=2, description="pixels along each parameter")
        mean: bool = Field(False, description="divide by the sum of the weights")
        quantile: float = Field(
            0.0, ge=0, lt=0.5, description="share of training samples that may stick out of the box on each side"
        )
        classifier: Literal["forest", "svm"] = Field(
            "forest", description="random forest of 200 trees, or support vectors with C = 10"
        )
        chunk: int = Field(20, ge=1, description="samples in a step")
        backend: Backend = Field(
            "auto", description="what decomposes: multipers, fibered (without it), or what is installed"
        )
        module_store: str | None = Field(
            None, description="folder that keeps decompositions for other runs; none: no store"
        )

        presets = {
            "paper": {
                "lines": 500,
                "resolution": 50,
                "powers": (0.0, 1.0, 2.0),
                "bandwidths": (0.01, 0.05, 0.1),
                "threshold": None,
                "density_bandwidth": 0.1,
            }
        }

        @field_validator("degrees", "functions", "powers", "bandwidths")
        @classmethod
        def _some_in_range(cls, value: tuple[Any, ...], info: ValidationInfo) -> tuple[Any, ...]:
            if not value:
                raise ValueError("needs at least one entry")
            if info.field_name != "functions" and not min(value) >= 0:
                raise ValueError("must all be at least 0")
            if info.field_name == "bandwidths" and min(value) == 0:
                raise ValueError("must all be above 0")
            return value

    class Setup(ShapeSetup):
        """What a run by name builds."""

    def __init__(self, config: Any = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        self.seed = 0
        self.decompositions = _Modules()
        self._builder: FiltrationBuilder | None = None

    @classmethod
    def build(cls, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> tuple[Self, Any]:
        made = cls(config)
        made.on, made.seed = load_shapes(setup), seed
        return made, made.on

    # ---- the work ----------------------------------------------------------------------------------------------------------

    def steps(self) -> int:
        return -(-sum(len(getattr(self.on, part)) for part in PARTS) // self.config.chunk)

    def work(self, step: int) -> Mapping[str, float]:
        """The decompositions of one chunk of samples."""
        chosen = self._samples()[step * self.config.chunk : (step + 1) * self.config.chunk]
        c = self.config
        decomposer = Decomposer(c.degrees, lines=c.lines, backend=c.backend, store=c.module_store)
        found = decomposer.transform(self.builder().transform(chosen))
        self.decompositions.found[step * c.chunk :] = found
        return {"summands": sum(map(len, found)) / len(found)}

    def state(self) -> Mapping[str, Any]:
        return {"modules": self.decompositions}

    def builder(self) -> FiltrationBuilder:
        """The filtration, with units learnt from the training part."""
        if self._builder is None:
            c, graphs = self.config, isinstance(self.on.train, GraphData)
            made = FiltrationBuilder(
                "graph" if graphs else "function-rips",
                dimension=1 if graphs else max(c.degrees) + 1,
                density=c.density,
                density_bandwidth=c.density_bandwidth,
                threshold=c.threshold,
                functions=c.functions,
            )
            self._builder = made.fit(_listed(self.on.train))
        return self._builder

    def _samples(self) -> list[Any]:
        return [sample for part in PARTS for sample in _listed(getattr(self.on, part))]

    def _parted(self, values: Sequence[Any]) -> dict[str, Any]:
        """What there is for all samples, by part."""
        ends = np.cumsum([0, *(len(getattr(self.on, part)) for part in PARTS)])
        return {part: values[a:b] for part, (a, b) in zip(PARTS, itertools.pairwise(ends), strict=True)}

    # ---- judging it --------------------------------------------------------------------------------------------------------

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """Accuracy of the chosen representation and of one-parameter images, and images of some samples of each class."""
        c = self.config
        modules, labels = (
            self._parted(self.decompositions.found),
            {p: getattr(self.on, p).labels_tensor().numpy() for p in PARTS},
        )
        candidates = list(itertools.product(c.powers, c.bandwidths))
        own = [
            DecompositionTransformer(
                c.degrees,
                local=c.local,
                power=power,
                bandwidth=bandwidth,
                resolution=c.resolution,
                mean=c.mean,
                quantile=c.quantile,
            )
            for power, bandwidth in candidates
        ]
        rivals = [
            PersistenceImages(bandwidth=bandwidth, power=min(power, 2.0), resolution=c.resolution)
            for power, bandwidth in candidates
        ]
        filtrations = self.builder().transform(self._samples())
        slices = tuple(range(len(c.functions))) if isinstance(self.on.train, GraphData) else (0,)
        cutter = Barcodes(c.degrees, slices=slices).fit(self._parted(filtrations)["train"])
        bars = self._parted(cutter.transform(filtrations))
        self.estimator, first = choose(own, modules, labels, c.classifier, self.seed)
        _, second = choose(rivals, bars, labels, c.classifier, self.seed)
        rows = [{"who": self.name, **first}, {"who": "one-parameter persistence images", **second}]
        return {"rows": rows, "pictures": [self._picture(modules["test"], labels["test"], class_names)]}

    def _picture(
        self, modules: Sequence[IntervalSummands], labels: NDArray[np.int64], names: Sequence[str] | None
    ) -> dict[str, str]:
        shown = np.concatenate([np.flatnonzero(labels == y)[:SHOWN] for y in np.unique(labels)])
        images = self.estimator.set_params(flatten=False).transform([modules[i] for i in shown])
        self.estimator.set_params(flatten=True)
        titles = [str(labels[i]) if names is None else names[labels[i]] for i in shown]
        samples = _listed(self.on.test)
        clouds = None if isinstance(self.on.test, GraphData) else [samples[i] for i in shown]
        return {
            "title": "representations",
            "caption": f"test samples of each class, and below each its images in degrees {', '.join(map(str, self.config.degrees))}; "
            "the first parameter goes to the right, the second up",
            "png": representation_sheet(images, titles, [f"H{d}" for d in self.config.degrees], clouds),
        }

    def save_artifact(self, folder: Path, description: dict[str, Any]) -> None:
        """See :mod:`limbeck.blocks.representation_files`."""
        parts = self._parted(self.decompositions.found)
        features = {part: self.estimator.transform(modules) for part, modules in parts.items()}
        labels = {part: getattr(self.on, part).labels_tensor().numpy() for part in PARTS}
        found = Representations(self.estimator, features, labels, self.decompositions.found)
        write_representations(found, folder, description)


class _Modules:
    """Decompositions so far, as a checkpoint keeps them."""

    def __init__(self) -> None:
        self.found: list[IntervalSummands] = []

    def state_dict(self) -> dict[str, Any]:
        return join_summands(self.found)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.found[:] = split_summands(state)


def choose(
    candidates: Sequence[Any], data: Mapping[str, Any], labels: Mapping[str, Any], classifier: str, seed: int = 0
) -> tuple[Any, dict[str, float]]:
    """The transformer whose vectors classify the validation part best, fitted on the training part, and its test measures.

    Args:
        candidates: transformers; the first of equally good ones is taken.
        data, labels: by part (train, val, test).
        classifier: ``forest`` or ``svm``.
        seed: of the forest.
    """
    best, score, model = None, -1.0, None
    for candidate in candidates:
        train = candidate.fit(data["train"]).transform(data["train"])
        trained = make_classifier(classifier, seed).fit(train, labels["train"])
        found = float(trained.score(candidate.transform(data["val"]), labels["val"]))
        if found > score:
            best, score, model = candidate, found, trained
    assert best is not None and model is not None
    return best, {
        **measures(model, best.transform(data["test"]), labels["test"]),
        "features": float(best.n_features_out_),
    }


def make_classifier(kind: str, seed: int = 0) -> Any:
    """A random forest of 200 trees, or support vectors (RBF kernel, C = 10) on standardised columns."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    if kind == "forest":
        return RandomForestClassifier(200, random_state=seed)
    return make_pipeline(StandardScaler(), SVC(C=10.0))


def measures(model: Any, features: Floats, labels: NDArray[np.int64]) -> dict[str, float]:
    """Accuracy and macro F1."""
    from sklearn.metrics import f1_score

    answers = model.predict(features)
    return {
        "accuracy": float((answers == labels).mean()),
        "macro_f1": float(f1_score(labels, answers, average="macro")),
    }


def _listed(data: Data) -> list[Any]:
    """A part's samples, one by one: clouds as arrays, graphs as graphs."""
    if isinstance(data, GraphData):
        return [data.graph(i) for i in range(len(data))]
    assert isinstance(data, TensorData)
    return list(data.inputs.numpy())
