"""How samplers are judged side by side: the same noise and conditions for all, and held-out real samples to compare with.

What counts: distance to the data's law in pixels and in the features of a classifier (another network than any generator), quality and
coverage, whether samples are of the class that was asked for, the distance to the teacher's own fine solution from the same noise, and cost.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor

from limbeck.core.batch import map_tensors
from limbeck.core.data import Data, mix_seed
from limbeck.core.errors import InputError
from limbeck.diffusion.conditions import Condition, Conditions, rows, take
from limbeck.diffusion.oracles import Oracle
from limbeck.diffusion.samplers import Sampler
from limbeck.metrics.cost import count_parameters
from limbeck.metrics.generative import (
    classes_covered,
    condition_agreement,
    density_coverage,
    frechet_distance,
    kernel_mmd,
    modes_covered,
    paired_mse,
    precision_recall,
    sliced_wasserstein,
    spread_ratio,
)
from limbeck.report.sample_grids import sample_grid, scatter_grid
from limbeck.tasks.generation import GenerationTask, real_samples

FEWEST, MOST = 2000, 10_000
MODE_RADIUS = 3.0
"""A sample is near a mode within so many of its standard deviations (98.9 % of true ones in the plane)."""


class FeatureClassifier(Protocol):
    """A classifier of samples: logits when called, and the representation before its head."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def features(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Ground:
    """What samplers are judged on; everything that is None is not measured.

    Attributes:
        shape: of one sample.
        reference: (N, ...) held-out real samples; never those that anything was trained on.
        cond: (M, ...) conditions that are gone through in turn, with the shares that the reference has; None: unconditional.
        classifier: tells classes and has features; not the generator's nor the teacher's own network.
        exact: the law itself, of a mixture.
        names: of the classes.
    """

    shape: tuple[int, ...]
    reference: Tensor | None = None
    cond: Condition = None
    classifier: FeatureClassifier | None = None
    exact: Oracle | None = None
    names: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        conditions: Conditions | None = None,
        test: Data | None = None,
        on: GenerationTask | None = None,
        *,
        progress: bool = True,
    ) -> Ground:
        """The ground that held-out data and a task give.

        Args:
            conditions: what samplers may be asked for. Where these and the labels of ``test`` are both classes, the latter are asked for, so that
                samples and reference have the same shares of them.
            test: held-out samples (of a task: ``val`` to choose by, ``test`` to report).
            on: the task, for its classifier and its law.
            progress: show a bar where the classifier must be trained first.
        """
        reference, labels = (None, None) if test is None else real_samples(test, MOST)
        cond = None if conditions is None else conditions.values
        if labels is not None and _classes(cond) and _classes(labels):
            cond = labels
        return cls(
            shape=tuple(shape),
            reference=reference,
            cond=cond,
            classifier=None if on is None else on.classifier(progress=progress),  # type: ignore[arg-type]
            exact=None if on is None else on.exact,
            names=tuple(conditions.names)
            if on is None and conditions is not None
            else tuple(on.class_names if on else ()),
        )


@dataclass(frozen=True)
class Draws:
    """Samples of several samplers from the same noise.

    Attributes:
        samples: (N, ...) by the sampler's name, on the CPU.
        nfe: network evaluations per sample that were really made.
        cond: the conditions (N, ...), or None.
    """

    samples: dict[str, Tensor]
    nfe: dict[str, int]
    cond: Any = field(default=None)


def draw(
    samplers: Mapping[str, Sampler],
    shape: tuple[int, ...],
    count: int,
    cond: Condition = None,
    *,
    seed: int = 0,
    batch_size: int = 500,
    device: torch.device | None = None,
) -> Draws:
    """``count`` samples of each sampler; sample n of all of them has the same initial noise, added noise and condition.

    Args:
        shape: of one sample.
        cond: conditions, gone through in turn.
    """
    size = rows(cond)
    asked = None if size is None else take(cond, torch.arange(count) % size)
    found: dict[str, list[Tensor]] = {name: [] for name in samplers}
    nfe = dict.fromkeys(samplers, 0)
    for start in range(0, count, batch_size):
        ids = torch.arange(start, min(start + batch_size, count))
        z = torch.randn((len(ids), *shape), generator=torch.Generator().manual_seed(mix_seed(seed, start, 401)))
        for name, sampler in samplers.items():
            where = device_of(sampler) if device is None else device
            own = _moved(take(asked, ids), where)
            made = sampler.sample(z.to(where), own, torch.Generator().manual_seed(mix_seed(seed, start, 409)))
            found[name].append(made.x.float().cpu())
            nfe[name] = max(nfe[name], made.nfe)
    return Draws({name: torch.cat(parts) for name, parts in found.items()}, nfe, asked)


def judge_samplers(
    samplers: Mapping[str, Sampler],
    *,
    shape: Sequence[int],
    conditions: Conditions | None = None,
    test: Data | None = None,
    on: GenerationTask | None = None,
    fine: Sampler | None = None,
    count: int | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    batch_size: int = 500,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Measure several samplers on the same noise and conditions.

    Args:
        samplers: by name.
        shape: of one sample.
        conditions, test, on: what they are asked for and compared with; see :meth:`Ground.of`.
        fine: the teacher's fine solution, for ``paired_mse`` (of samplers that follow its ODE).
        count: samples of each; None: as many as the reference, between 2,000 and 10,000.
        seed: of noise.
        device: where to sample; None: where each network is.
        progress: show a bar where something must be trained first.

    Returns:
        a row for each: ``who`` and, where the ground allows, ``frechet_pixels`` ``frechet_features`` ``sliced_wasserstein`` ``mmd`` (in the plane)
        ``precision`` ``recall`` ``density`` ``coverage`` ``condition_agreement`` ``classes_covered`` ``modes`` ``near_modes``
        ``spread_ratio`` ``paired_mse``; always ``nfe`` ``seconds_per_sample`` ``parameters``. A sampler that gives NaN or infinity has
        NaN for its quality.

    Raises:
        InputError: no samplers, or a count below 10.
    """
    if not samplers:
        raise InputError("there is no sampler to judge")
    ground = Ground.of(shape, conditions, test, on, progress=progress)
    if count is None:
        count = FEWEST if ground.reference is None else min(max(len(ground.reference), FEWEST), MOST)
    if count < 10:
        raise InputError(f"at least 10 samples are needed to judge (got {count})")
    how: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "device": device}
    drawn = draw(samplers, ground.shape, count, ground.cond, **how)
    wanted = None
    if fine is not None:
        wanted = draw({"fine": fine}, ground.shape, count, ground.cond, **how).samples["fine"]
    compared = Compared(ground, drawn.cond)
    return [
        {
            "who": name,
            **compared.measures(drawn.samples[name], wanted),
            "nfe": drawn.nfe[name],
            "seconds_per_sample": seconds_per_sample(
                sampler, ground.shape, take(drawn.cond, torch.arange(min(64, count)))
            ),
            "parameters": count_parameters(sampler.denoiser.module),
        }
        for name, sampler in samplers.items()
    ]


class Compared:
    """Measures of sets of samples against one ground; what concerns the reference alone is computed once."""

    def __init__(self, ground: Ground, cond: Any) -> None:
        self.ground, self.cond = ground, cond
        self.features = None if ground.reference is None else self._features(ground.reference)

    def measures(self, samples: Tensor, fine: Tensor | None = None) -> dict[str, float]:
        """Every measure of quality that the ground allows, of samples (N, ...) drawn with the conditions in order."""
        if bool(torch.isfinite(samples).all()):
            return self._measures(samples, fine)
        # The names come from samples that can be measured.
        kind = torch.randn(samples.shape, generator=torch.Generator().manual_seed(0))
        return dict.fromkeys(self._measures(kind, fine), math.nan)

    def _measures(self, samples: Tensor, fine: Tensor | None) -> dict[str, float]:
        ground, found = self.ground, dict[str, float]()
        if ground.reference is not None:
            real, seen = ground.reference, samples
            found["frechet_pixels"] = frechet_distance(samples, ground.reference)
            features = self._features(samples)
            if features is not None and self.features is not None:
                real, seen = self.features, features  # where there are features, neighbours are sought among them
                found["frechet_features"] = frechet_distance(seen, real)
            found["sliced_wasserstein"] = sliced_wasserstein(samples, ground.reference)
            if samples[0].numel() == 2:
                found["mmd"] = kernel_mmd(samples, ground.reference)
            found |= {**precision_recall(real, seen), **density_coverage(real, seen)}
            found["spread_ratio"] = spread_ratio(samples, ground.reference)
        logits = self._logits(samples)
        if logits is not None:
            if _classes(self.cond):
                found["condition_agreement"] = condition_agreement(logits, self.cond)
            found["classes_covered"] = classes_covered(torch.softmax(logits.double(), 1))
        if ground.exact is not None and ground.exact.module.std > 0:
            mixture = ground.exact.module
            found |= modes_covered(samples, mixture.means.cpu(), MODE_RADIUS * mixture.std)
        if fine is not None:
            found["paired_mse"] = paired_mse(samples, fine)
        return found

    def _features(self, samples: Tensor) -> Tensor | None:
        return None if self.ground.classifier is None else _in_parts(self.ground.classifier.features, samples)

    def _logits(self, samples: Tensor) -> Tensor | None:
        if self.ground.classifier is not None:
            return _in_parts(self.ground.classifier, samples)
        exact = self.ground.exact
        return None if exact is None or exact.module.labels is None else exact_logits(exact, samples)


@torch.no_grad()
def exact_logits(law: Oracle, samples: Tensor) -> Tensor:
    """Log densities of the classes of a mixture (N, C) up to a constant: the best classifier there can be.

    Raises:
        InputError: its components have no classes.
    """
    labels = law.module.labels
    if labels is None:
        raise InputError("the components of the mixture have no classes")
    parts = law.module.log_components(samples.double(), samples.new_zeros(len(samples), dtype=torch.float64), None)
    classes = int(labels.max()) + 1
    own = labels[None] == torch.arange(classes, device=labels.device)[:, None]  # (C, K)
    return torch.logsumexp(parts[:, None, :].masked_fill(~own, -torch.inf), 2)


@torch.no_grad()
def _in_parts(network: Callable[[Tensor], Tensor], samples: Tensor, size: int = 1000) -> Tensor:
    parameters = getattr(network, "parameters", None) or getattr(getattr(network, "__self__", None), "parameters", None)
    first = None if parameters is None else next(iter(parameters()), None)
    device = samples.device if first is None else first.device
    return torch.cat([network(part.to(device)).float().flatten(1).cpu() for part in samples.split(size)])


def device_of(sampler: Sampler) -> torch.device:
    """Where a sampler's network is."""
    tensor = next(iter([*sampler.denoiser.parameters(), *sampler.denoiser.buffers()]), None)
    return torch.device("cpu") if tensor is None else tensor.device


def seconds_per_sample(
    sampler: Sampler, shape: tuple[int, ...], cond: Condition = None, *, batch_size: int = 64, repeats: int = 3
) -> float:
    """Median time of one batch after a warm-up, over the samples in it; on this machine, with what else it does."""
    device = device_of(sampler)
    size = rows(cond) or batch_size
    z = torch.randn((size, *shape), generator=torch.Generator().manual_seed(0)).to(device)
    own = _moved(cond, device)
    generator = torch.Generator().manual_seed(0)
    taken = []
    for _ in range(repeats + 1):
        _finish(device)
        began = time.perf_counter()
        sampler.sample(z, own, generator)
        _finish(device)
        taken.append(time.perf_counter() - began)
    return median(taken[1:]) / size


def _moved(cond: Condition, device: torch.device) -> Any:
    return map_tensors(cond, lambda value: value.to(device))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sample_pictures(
    samplers: Mapping[str, Sampler],
    *,
    shape: Sequence[int],
    conditions: Conditions | None = None,
    seed: int = 0,
    decode: Callable[[Tensor], Tensor] | None = None,
    on: GenerationTask | None = None,
    device: torch.device | None = None,
    images: int = 10,
    points: int = 1000,
) -> list[dict[str, str]]:
    """Pictures for the report: samplers side by side at equal noise, beside held-out data where there is a task.

    Args:
        samplers, shape, conditions, seed, on, device: as for :func:`judge_samplers`.
        decode: samples -> pictures in [-1, 1]; None: as they are.
        images: noises (rows), where samples are images; the conditions go round evenly.
        points: samples, in the plane.

    Returns:
        entries with ``title``, ``caption`` and ``png`` (base64); none where samples are neither images of 1 or 3 channels nor points.
    """
    values = None if conditions is None else conditions.values
    if tuple(shape) == (2,):
        drawn = draw(samplers, tuple(shape), points, values, seed=seed, device=device)
        data = None if on is None else real_samples(on.test, points)[0].numpy()
        png = scatter_grid({name: x.numpy() for name, x in drawn.samples.items()}, data)
        caption = f"{points} samples from the same noise" + (" over held-out data (grey)." if data is not None else ".")
        return [{"title": "Samples", "caption": caption, "png": png}]
    cond = None if conditions is None or values is None else conditions.spread(images)
    drawn = draw(samplers, tuple(shape), images, cond, seed=seed, device=device)
    shown = {name: x if decode is None else decode(x.to(device)).float().cpu() for name, x in drawn.samples.items()}
    sample = next(iter(shown.values()))
    if sample.ndim != 4 or sample.shape[1] not in (1, 3):
        return []
    columns = {name: as_pixels(x).numpy() for name, x in shown.items()}
    labels: list[str] | None = None
    if _classes(cond):
        names = (list(on.class_names) if on is not None else []) or (
            [] if conditions is None else list(conditions.names)
        )
        labels = [names[c] if c < len(names) else str(c) for c in cond.tolist()]
    if on is not None:
        real, classes = real_samples(on.test)
        ids = (
            Conditions(classes).spread_ids(images) if _classes(classes) and labels else torch.arange(images) % len(real)
        )
        columns["held-out data"] = as_pixels(real[ids]).numpy()
    same = "noise and condition" if cond is not None else "noise"
    caption = f"Each row starts from the same {same} in the column of every sampler."
    return [{"title": "Samples at equal noise", "caption": caption, "png": sample_grid(columns, labels)}]


def _classes(cond: Condition) -> TypeGuard[Tensor]:
    """Whether conditions are class ids (N,)."""
    return isinstance(cond, Tensor) and cond.ndim == 1 and not cond.is_floating_point()


def as_pixels(samples: Tensor) -> Tensor:
    """Samples in [-1, 1] as uint8; what is beyond is clamped, NaN is black."""
    return ((torch.nan_to_num(samples, nan=-1.0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
