"""What a network does between and around given weights: linear mode connectivity, and planes of loss or probe accuracy.

Weights of many points are stacked, (P, ...) by name (:func:`limbeck.blocks.interpolation.linear_path`,
:meth:`limbeck.blocks.interpolation.Plane.points`), and run side by side with :func:`torch.func.vmap`. Networks run in evaluation
mode, without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from limbeck.blocks.interpolation import Plane, State, linear_path
from limbeck.core.batch import Batch, first_tensor, logits_of
from limbeck.core.data import Data
from limbeck.core.errors import InputError

Measure = Callable[[Tensor, Batch], Tensor]
"""(outputs (B, ...) of one point, batch) -> one value per sample (B,)."""


def error_rate(logits: Tensor, batch: Batch) -> Tensor:
    """1 where the largest logit is not the label's, else 0; (B, C) -> (B,)."""
    return (logits.argmax(-1) != _labels(batch)).to(logits.dtype)


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Negative log-likelihood of the labels in nats; (B, C) -> (B,)."""
    return F.cross_entropy(logits, _labels(batch), reduction="none")


def outputs_at(
    model: nn.Module, states: State, inputs: Any, *, chunk: int | None = 4, vectorise: bool = True
) -> Tensor:
    """Outputs (P, B, ...) of a network at P points of weight space, on one batch of inputs.

    Args:
        model: gives a tensor (or a container with logits). Its own weights are left alone.
        states: stacked weights (P, ...) by name, of all parameters and buffers.
        inputs: a tensor, a tuple (positional arguments) or a mapping (keyword arguments).
        chunk: points that run together; None: all. Few are best on a CPU, many on a GPU.
        vectorise: False runs the points one after the other, for modules that :func:`torch.func.vmap` cannot map.

    Raises:
        InputError: no points, or states that do not fit the model.
    """
    _check_states(model, states)

    def call(state: dict[str, Tensor]) -> Tensor:
        if isinstance(inputs, Mapping):
            return logits_of(functional_call(model, state, (), dict(inputs)))
        return logits_of(functional_call(model, state, inputs if isinstance(inputs, tuple) else (inputs,)))

    with _evaluating(model), torch.no_grad():
        if vectorise:
            found: Tensor = vmap(call, chunk_size=chunk, randomness="same")(dict(states))
            return found
        return torch.stack([call({k: v[p] for k, v in states.items()}) for p in range(_points(states))])


def mean_at(
    model: nn.Module,
    states: State,
    data: Data,
    measures: Mapping[str, Measure],
    *,
    batch_size: int = 512,
    chunk: int | None = 4,
    vectorise: bool = True,
) -> dict[str, Tensor]:
    """Means over a data set of per-sample measures, at P points of weight space.

    Args:
        model, states, chunk, vectorise: see :func:`outputs_at`.
        data: read once, unaugmented.
        measures: by name.
        batch_size: samples at a time.

    Returns:
        by name (P,), in double precision on the CPU.
    """
    device = first_tensor(states)
    sums = {name: torch.zeros(_points(states), dtype=torch.float64) for name in measures}
    for batch in data.batches(batch_size):
        batch = batch if device is None else batch.to(device.device)
        outputs = outputs_at(model, states, batch.inputs, chunk=chunk, vectorise=vectorise)
        for name, measure in measures.items():
            per_point = torch.stack([measure(output, batch) for output in outputs])
            if per_point.shape != outputs.shape[:2]:
                raise InputError(
                    f"the measure '{name}' must give one value per sample, not {tuple(per_point.shape[1:])}"
                )
            sums[name] += per_point.double().sum(1).cpu()
    return {name: total / len(data) for name, total in sums.items()}


# ---- linear mode connectivity --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Connectivity:
    """Error and loss along the straight line between two networks.

    Attributes:
        positions: t (P,); 0 is the first network, 1 the second.
        error: error rate (P,).
        loss: mean cross-entropy (P,), nats.
    """

    positions: Tensor
    error: Tensor
    loss: Tensor

    @property
    def barrier(self) -> float:
        """:func:`barrier` of the error rate: near 0 where the two lie in one linearly connected basin."""
        return barrier(self.error)

    @property
    def loss_barrier(self) -> float:
        """:func:`barrier` of the loss."""
        return barrier(self.loss)


def barrier(values: Tensor) -> float:
    """The largest value on a path (P,) minus the mean of its two ends.

    Source: "Linear Mode Connectivity and the Lottery Ticket Hypothesis" (2020).

    Raises:
        InputError: fewer than two points.
    """
    if values.ndim != 1 or len(values) < 2:
        raise InputError(f"a path needs at least two points, not values of shape {tuple(values.shape)}")
    return float(values.max() - (values[0] + values[-1]) / 2)


def mode_connectivity(
    model: nn.Module,
    first: nn.Module | State,
    second: nn.Module | State,
    data: Data,
    *,
    points: int = 11,
    **options: Any,
) -> Connectivity:
    """Error and loss of a classifier along the straight line between two sets of its weights.

    Args:
        model: the architecture; its own weights do not matter.
        first, second: the ends: models, or their states.
        data: with class labels, unaugmented.
        points: on the line, ends included.
        options: see :func:`mean_at`.

    Raises:
        InputError: different architectures, fewer than two points, or data without labels.
    """
    if points < 2:
        raise InputError(f"a path needs at least two points (got {points})")
    positions = torch.linspace(0, 1, points, dtype=torch.float64)
    states = linear_path(first, second, positions)
    found = mean_at(model, states, data, {"error": error_rate, "loss": cross_entropy}, **options)
    return Connectivity(positions, found["error"], found["loss"])


# ---- planes --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Surface:
    """Values on a grid in the plane through three networks.

    Attributes:
        x, y: coordinates of the columns (W,) and rows (H,), in the units of the weights.
        values: (H, W).
        corners: (3, 2), where the three networks lie.
    """

    x: Tensor
    y: Tensor
    values: Tensor
    corners: Tensor


def surface(
    plane: Plane,
    value: Callable[[dict[str, Tensor]], Tensor],
    *,
    points: int = 11,
    margin: float = 0.25,
    chunk: int = 16,
) -> Surface:
    """Any value on a square grid in a plane.

    Args:
        plane: see :meth:`limbeck.blocks.interpolation.Plane.through`.
        value: stacked states (P, ...) -> (P,); a loss (:func:`mean_at`) or the accuracy of a probe (:func:`outputs_at`, then a probe
            for each point).
        points: on each side of the grid.
        margin: how far the grid reaches beyond the three networks, as a share of their extent.
        chunk: points whose weights are held at once.

    Raises:
        InputError: fewer than two points, or values of another shape.
    """
    if points < 2:
        raise InputError(f"a grid needs at least two points on each side (got {points})")
    low, high = plane.corners.amin(0), plane.corners.amax(0)
    room = margin * (high - low)
    x = torch.linspace(float(low[0] - room[0]), float(high[0] + room[0]), points, dtype=torch.float64)
    y = torch.linspace(float(low[1] - room[1]), float(high[1] + room[1]), points, dtype=torch.float64)
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    found = []
    for part in torch.stack([columns.flatten(), rows.flatten()], 1).split(chunk):
        values = value(plane.points(part))
        if values.shape != (len(part),):
            raise InputError(f"the value must be one number per point, not of shape {tuple(values.shape)}")
        found.append(values.double().cpu())
    return Surface(x, y, torch.cat(found).view(points, points), plane.corners)


def _labels(batch: Batch) -> Tensor:
    if batch.labels is None:
        raise InputError("the error of a network needs labels, and the data has none")
    return batch.labels


def _points(states: State) -> int:
    return len(next(iter(states.values()))) if states else 0


def _check_states(model: nn.Module, states: State) -> None:
    count = _points(states)
    if not count:
        raise InputError("there are no points to run the network at")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name not in states or states[name].shape != (count, *tensor.shape):
            raise InputError(
                f"the states do not fit the network: '{name}' should be there with shape {(count, *tensor.shape)}"
            )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
