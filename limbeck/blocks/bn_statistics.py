"""How far a batch's feature statistics are from those of the data a network was trained on.

A network with batch normalisation remembers, at every such layer, the mean and the variance that its training data had
there. Inverting the network (DeepInversion, SRe2L, CDA, INFER) pulls the statistics of synthetic images towards them.
Networks without such a memory (layer or group normalisation) are compared with moments recorded on real data.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch, call_model
from limbeck.core.errors import InputError, UnknownNameError

FIRST_WEIGHT = 10.0
"""Weight of the first layer, the one closest to the pixels; all others have 1."""
EPS = 1e-6
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_OTHER_NORMS = (nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Moments:
    """Mean and variance (C,) of every channel of a layer's input."""

    mean: Tensor
    variance: Tensor


class StatisticsDistance:
    r"""The distance of a batch's statistics from the running ones, summed over layers.

    With :math:`m_l, s_l` the mean and the biased variance of the *input* of layer l over samples and positions, and
    :math:`\mu_l, \sigma^2_l` what the layer remembers:

    .. math:: R = \sum_l w_l \big( \lVert m_l - \mu_l \rVert_2 + \lVert s_l - \sigma^2_l \rVert_2 \big)

    The norms are plain, not squared, so their gradient is undefined at 0; :math:`\sqrt{x^2 + \epsilon^2} - \epsilon` takes
    their place, which is 0 at 0 with gradient 0::

        statistics = StatisticsDistance(teacher)  # in evaluation mode
        with statistics:
            logits = teacher(images)
        loss = cross_entropy(logits, labels) + 0.1 * statistics.distance()

    Layers that a forward pass reaches several times count every time; layers it does not reach count nothing. So does a layer
    whose statistics come from fewer than two values per channel: their variance says nothing.

    Args:
        network: in evaluation mode. Nothing in it is changed; the hooks are there only inside ``with``.
        layers: paths of the layers; None: every BatchNorm1d and BatchNorm2d, or every layer in ``recorded`` if that is given.
        recorded: moments by path for layers that keep none (see :func:`record_moments`), or to use in place of the kept ones.
        weights: w_l in the order of the layers; None: 10 for the first, 1 for the rest.
        groups: G; the batch holds G independent class batches of equal size one after the other, each with statistics of its
            own.

    Raises:
        InputError: the network has no such layer, is in training mode (when entered), a layer keeps no running statistics or
            ones that are not finite, or there are not as many weights as layers.
        UnknownNameError: no layer of that path.

    Source: "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion" (2020); weight of the first layer and norms
    as in "Squeeze, Recover and Relabel" (2023).
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        layers: Sequence[str] | None = None,
        recorded: Mapping[str, Moments] | None = None,
        weights: Sequence[float] | None = None,
        groups: int = 1,
    ) -> None:
        if groups < 1:
            raise InputError(f"statistics need at least one class batch (got groups {groups})")
        self.network, self.groups = network, groups
        modules = dict(network.named_modules())
        recorded = recorded or {}
        if layers is None:
            layers = list(recorded) or [name for name, m in modules.items() if isinstance(m, _BATCH_NORMS)]
        if not layers:
            raise InputError(
                f"{type(network).__name__} has no BatchNorm layer, so there are no statistics to match: take a teacher with "
                "batch normalisation, or record the moments of other layers on real data"
            )
        for name in layers:
            if name not in modules:
                raise UnknownNameError("layer", name, filter(None, modules))
        self.layers = tuple(layers)
        self._modules = [modules[name] for name in layers]
        self._targets = [
            recorded[name] if name in recorded else _running(name, m)
            for name, m in zip(layers, self._modules, strict=True)
        ]
        if weights is None:
            weights = [FIRST_WEIGHT] + [1.0] * (len(layers) - 1)
        if len(weights) != len(layers):
            raise InputError(f"{len(weights)} weights for {len(layers)} layers: give one for each")
        self.weights = tuple(float(w) for w in weights)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._found: list[list[Tensor]] = [[] for _ in layers]

    def __enter__(self) -> Self:
        if self._handles:
            raise InputError("these statistics are being collected already: leave the first 'with' before a second one")
        if any(m.training for m in self._modules):
            raise InputError(
                "the network is in training mode, where a forward pass changes its running statistics: call eval() first"
            )
        self._found = [[] for _ in self.layers]
        for place, module in enumerate(self._modules):
            self._handles.append(module.register_forward_pre_hook(self._collector(place)))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _collector(self, place: int) -> Any:
        target = self._targets[place]
        name = self.layers[place]

        def collect(module: nn.Module, args: tuple[Any, ...]) -> None:
            x, axis = args[0], _channel_axis(module, args[0])
            if len(x) % self.groups:
                raise InputError(
                    f"layer '{name}' got {len(x)} samples, which are not {self.groups} class batches of equal size"
                )
            if x.numel() < 2 * self.groups * x.shape[axis]:
                return
            grouped = x.unflatten(0, (self.groups, -1))
            over = [d for d in range(1, grouped.ndim) if d != axis + 1]
            variance, mean = torch.var_mean(grouped, over, correction=0)
            device = mean.device
            distance = _norm(mean - target.mean.to(device)) + _norm(variance - target.variance.to(device))
            self._found[place].append(distance)

        return collect

    def per_layer(self) -> Tensor:
        """(L, G) unweighted distances of the last forward pass, in the order of :attr:`layers`.

        Raises:
            InputError: no forward pass was seen.
        """
        example = next(itertools.chain.from_iterable(self._found), None)
        if example is None:
            raise InputError("no layer has seen a batch: run the network inside 'with'")
        nothing = torch.zeros_like(example)
        return torch.stack([torch.stack(found).sum(0) if found else nothing for found in self._found])

    def distances(self) -> Tensor:
        """(G,) weighted distance R of every class batch."""
        rows = self.per_layer()
        return (rows.new_tensor(self.weights)[:, None] * rows).sum(0)

    def distance(self) -> Tensor:
        """R, a scalar: the mean over class batches (there is one unless ``groups`` says otherwise)."""
        return self.distances().mean()


@torch.no_grad()
def record_moments(
    network: nn.Module, batches: Iterable[Any], layers: Sequence[str] | None = None
) -> dict[str, Moments]:
    """The moments of the inputs of normalisation layers on real data, for networks that do not keep them.

    They are pooled over all samples and positions, so they do not depend on the batch size (the mean of per-batch variances,
    which batch normalisation keeps, is a little smaller).

    Args:
        network: is put into evaluation mode while the data passes, then back.
        batches: what :meth:`limbeck.core.batch.Batch.of` takes.
        layers: paths; None: every LayerNorm and GroupNorm.

    Returns:
        moments by path, in order; for layers that no batch reached there are none.

    Raises:
        InputError: no such layer, or no data.
        UnknownNameError: no layer of that path.
    """
    modules = dict(network.named_modules())
    names = [n for n, m in modules.items() if isinstance(m, _OTHER_NORMS)] if layers is None else list(layers)
    if not names:
        raise InputError(f"{type(network).__name__} has no LayerNorm or GroupNorm whose inputs could be recorded")
    for name in names:
        if name not in modules:
            raise UnknownNameError("layer", name, filter(None, modules))
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def collector(name: str) -> Any:
        def collect(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows = args[0].movedim(_channel_axis(module, args[0]), -1).double().flatten(0, -2)
            both = torch.stack([rows.sum(0), rows.square().sum(0)])
            sums[name] = sums[name] + both if name in sums else both
            counts[name] = counts.get(name, 0) + len(rows)

        return collect

    modes = {m: m.training for m in modules.values()}
    handles = [modules[name].register_forward_pre_hook(collector(name)) for name in names]
    try:
        network.eval()
        for batch in batches:
            call_model(network, Batch.of(batch).inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if not sums:
        raise InputError("no layer has seen any data: give at least one batch")
    found = {}
    for name in (n for n in names if n in sums):
        mean, square = sums[name] / counts[name]
        found[name] = Moments(mean.float(), (square - mean.square()).clamp_min(0).float())
    return found


def _norm(difference: Tensor) -> Tensor:
    """(G, C) -> (G,): Euclidean norms that have a gradient at 0."""
    return (difference.square().sum(-1) + EPS**2).sqrt() - EPS


def _running(name: str, module: nn.Module) -> Moments:
    mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
        raise InputError(
            f"layer '{name}' ({type(module).__name__}) keeps no running statistics: leave it out, or record its moments on "
            "real data (record_moments)"
        )
    if not bool(torch.isfinite(mean).all() and torch.isfinite(variance).all()):
        raise InputError(f"the running statistics of layer '{name}' are not finite: the teacher is damaged")
    return Moments(mean.detach(), variance.detach())


def _channel_axis(module: nn.Module, x: Tensor) -> int:
    """Which axis of a layer's input are the channels; samples are the first, all others are positions.

    It is axis 1 for batch and group normalisation, the last for layer normalisation over one axis, and the first of the normalised
    axes where it goes over several (channels, height, width).
    """
    return x.ndim - len(module.normalized_shape) if isinstance(module, nn.LayerNorm) else 1
