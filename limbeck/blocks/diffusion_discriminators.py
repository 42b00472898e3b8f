r"""Discriminators on the features of a diffusion network: a trunk that knows noisy samples, and small heads.

Two published forms. :class:`PairDiscriminator` (SDXL-Lightning, Hyper-SD) looks at a point of a trajectory together with the point it
came from; its trunk is a trainable copy of the teacher. :class:`LevelDiscriminator` (phased consistency models) has a head at several
layers of the frozen teacher itself.

A trunk is any module called as ``trunk(x, t, cond)``; a :class:`~limbeck.diffusion.denoisers.Denoiser` is one. Its layers may give
maps (B, C, H, W), tokens (B, T, C) or vectors (B, C); each has heads of its own kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.blocks.taps import Tap, Taps, list_taps, unwrap
from limbeck.core.batch import join
from limbeck.core.errors import InputError

MIDDLE = ("mid_block", "middle_block", "middle", "mid")
"""What the bottom of a U-Net is called."""


class _Enough(Exception):
    """Every feature that was asked for is there: the rest of the trunk need not run."""


class Trunk(nn.Module):
    """Features of a network, whose forward pass ends at the last layer that is asked for.

    Args:
        network: called as ``network(x, t, cond)``.
        layers: module paths within it; of layers that run several times the first call counts.
        trainable: hold a trainable copy of the network. False: the network itself is used and not registered as a sub-module; its
            owner freezes, moves and saves it.

    Raises:
        UnknownNameError: no such layer.
        InputError: no layer at all.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str], *, trainable: bool) -> None:
        super().__init__()
        if not layers:
            raise InputError("a discriminator needs at least one layer of its trunk to look at")
        self.trainable = trainable
        if trainable:
            self.copied = deepcopy(unwrap(network)).requires_grad_(True)
        self._shared: list[nn.Module] = [] if trainable else [network]  # a list, so that it is no sub-module
        self._taps = Taps(self.network, [Tap(layer, call=0) for layer in layers])

    @property
    def network(self) -> nn.Module:
        return self.copied if self.trainable else self._shared[0]

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> list[Tensor]:
        """The layers' outputs, in order. Gradients flow to x, and to the parameters of a trainable copy."""
        waiting = {tap.path for tap in self._taps.taps}

        def reached(path: str) -> Any:
            def hook(*_: Any) -> None:
                waiting.discard(path)
                if not waiting:
                    raise _Enough

            return hook

        taps = self._taps
        with taps as found:
            handles = [
                module.register_forward_hook(reached(tap.path))
                for tap, module in zip(taps.taps, taps._modules, strict=True)
            ]
            try:
                self.network(x, t, cond)
            except _Enough:
                pass
            finally:
                for handle in handles:
                    handle.remove()
        return [found[tap] for tap in taps.taps]

    def __deepcopy__(self, memo: dict[int, Any]) -> Trunk:
        layers = [tap.path for tap in self._taps.taps]
        made = Trunk(self.network, layers, trainable=self.trainable)
        memo[id(self)] = made
        return made.train(self.training)


def default_layers(network: nn.Module, sample: tuple[Any, ...], levels: bool = False) -> list[str]:
    """Layers for a discriminator, where nobody names them; only such as depend on x.

    The bottom of a U-Net by its usual names; else the middle one of the longest list of blocks. With ``levels``: every entry of the
    lists of down blocks and the bottom, else all blocks of the longest list.

    Args:
        network: the trunk.
        sample: what one forward takes.

    Raises:
        InputError: nothing of the kind in the network.
    """
    called = [info.path for info in list_taps(network, sample) if info.shape is not None]
    called = _seeing(network, sample, called)
    names = set(called)
    bottom = [p for p in called if p.rpartition(".")[2] in MIDDLE]
    lists: dict[str, list[str]] = {}
    for path, module in unwrap(network).named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            inside = [f"{path}.{i}" if path else str(i) for i in range(len(module))]
            lists[path] = [p for p in inside if p in names]
    down = [p for path, inside in lists.items() if path.rpartition(".")[2].startswith("down") for p in inside]
    if bottom:
        return [*down, bottom[0]] if levels else [bottom[0]]
    longest = max(lists.values(), key=len, default=[])
    if not longest:
        raise InputError(
            f"{type(unwrap(network)).__name__} has no list of blocks: name the layers that the discriminator looks at"
        )
    return longest if levels else [longest[len(longest) // 2]]


def _seeing(network: nn.Module, sample: tuple[Any, ...], layers: Sequence[str]) -> list[str]:
    """Those of the layers whose output depends on x; an embedding of the time does not, and would tell nothing of the sample."""
    x, *others = sample
    frozen = [p for p in unwrap(network).parameters() if p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        taps = [Tap(layer, call=0) for layer in layers]
        with torch.enable_grad(), Taps(network, taps) as found:
            network(x.detach().clone().requires_grad_(True), *others)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    return [tap.path for tap in taps if found[tap].requires_grad]


def _geometry(feature: Tensor) -> tuple[str, int]:
    """What a layer gives, and its number of channels."""
    if feature.ndim == 4:
        return "map", feature.shape[1]
    if feature.ndim in (2, 3):
        return ("vector", feature.shape[1]) if feature.ndim == 2 else ("tokens", feature.shape[2])
    raise InputError(
        f"a discriminator reads maps (B, C, H, W), tokens (B, T, C) or vectors (B, C), not {tuple(feature.shape)}"
    )


def _groups(channels: int, positions: int) -> int:
    """32 groups, or fewer where they do not divide the channels or would hold less than eight values: a group of one is always 0."""
    groups = math.gcd(32, channels)
    while groups > 1 and channels // groups * positions < 8:
        groups //= 2
    return groups


class PooledHead(nn.Module):
    """One score for each sample from features of a layer.

    Maps: ``blocks`` times [4x4 convolution of stride 2, GroupNorm(32), SiLU], a 1x1 convolution, mean over positions; fewer blocks
    where the map would vanish, fewer groups where one would hold less than eight values, and a 1x1 convolution in the place of the last one on a map of one pixel. Vectors and tokens, where a
    convolution has no meaning: linear layers with LayerNorm; scores of tokens are averaged. Widths of vectors are those of the layer.

    Args:
        feature: an example (B, ...) of what comes in.
        blocks: at least one.
        width: channels inside; None: those of the feature.
    """

    def __init__(self, feature: Tensor, blocks: int = 2, width: int | None = None) -> None:
        super().__init__()
        if blocks < 1:
            raise InputError(f"a head needs at least one block (got {blocks})")
        self.kind, channels = _geometry(feature)
        inner = channels if width is None else width
        layers: list[nn.Module] = []
        rows, columns = feature.shape[2:] if self.kind == "map" else (0, 0)
        for _ in range(blocks):
            if self.kind == "map":
                shrinks = min(rows, columns) >= 2
                if layers and not shrinks:
                    break
                first = nn.Conv2d(channels, inner, 4, 2, 1) if shrinks else nn.Conv2d(channels, inner, 1)
                if shrinks:
                    rows, columns = rows // 2, columns // 2
                layers += [first, nn.GroupNorm(_groups(inner, rows * columns), inner), nn.SiLU()]
            else:
                layers += [nn.Linear(channels, inner), nn.LayerNorm(inner), nn.SiLU()]
            channels = inner
        layers.append(nn.Conv2d(channels, 1, 1) if self.kind == "map" else nn.Linear(channels, 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, ...) -> (B, 1)."""
        scores: Tensor = self.layers(feature)
        return scores.flatten(1).mean(1, keepdim=True)


class ResidualHead(nn.Module):
    """A score for each position of a layer: [convolution, GroupNorm, LeakyReLU], a residual one of the same, and a last layer.

    Convolutions are 3x3 on maps and linear layers on tokens and vectors, the last layer is 1x1.

    Args:
        feature: an example (B, ...) of what comes in.
        width: channels inside; None: those of the feature.
    """

    def __init__(self, feature: Tensor, width: int | None = None) -> None:
        super().__init__()
        kind, channels = _geometry(feature)
        inner = channels if width is None else width

        def block(before: int) -> nn.Sequential:
            if kind == "map":
                first: list[nn.Module] = [
                    nn.Conv2d(before, inner, 3, padding=1),
                    nn.GroupNorm(_groups(inner, feature.shape[2:].numel()), inner),
                ]
            else:
                first = [nn.Linear(before, inner), nn.LayerNorm(inner)]
            return nn.Sequential(*first, nn.LeakyReLU(0.2))

        self.first, self.second = block(channels), block(inner)
        self.last: nn.Module = nn.Conv2d(inner, 1, 1) if kind == "map" else nn.Linear(inner, 1)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, ...) -> (B, positions)."""
        hidden = self.first(feature)
        scores: Tensor = self.last(hidden + self.second(hidden))
        return scores.flatten(1)


class PairDiscriminator(nn.Module):
    r""":math:`D(p, t_e \mid x_t, t, c)`: is p, at time :math:`t_e`, where the teacher would have come from :math:`x_t`?

    The trunk sees (p, t_e, c) and (x_t, t, c) in one forward pass; both features are joined along their channels, and a head gives one
    score. Scores are logits: positive for "the teacher's".

    Args:
        network: the teacher's network; a trainable copy is the trunk, initialised from it.
        sample: (x, t, cond) of a small batch, from which the heads learn their shapes.
        layers: see :class:`Trunk`; None: :func:`default_layers`.
        blocks, width: of the heads, see :class:`PooledHead`; scores of several layers are averaged.
        pair: look at x_t as well; False: at p alone, as in the relaxed last phase of SDXL-Lightning.
        trainable: copy and train the trunk; False: the teacher itself, frozen by its owner.

    Source: "SDXL-Lightning: Progressive Adversarial Diffusion Distillation" (2024), used by "Hyper-SD: Trajectory Segmented Consistency
    Model for Efficient Image Synthesis" (2024). The forms for tokens and vectors are ours.
    """

    def __init__(
        self,
        network: nn.Module,
        sample: tuple[Any, ...],
        layers: Sequence[str] | None = None,
        *,
        blocks: int = 2,
        width: int | None = None,
        pair: bool = True,
        trainable: bool = True,
    ) -> None:
        super().__init__()
        chosen = default_layers(network, sample) if layers is None else list(layers)
        self.trunk = Trunk(network, chosen, trainable=trainable)
        self.pair = pair
        features = example_features(self.trunk, sample)
        self.heads = nn.ModuleList(
            PooledHead(self.joined(f, f) if pair else f, blocks, _width_of(f, width)) for f in features
        )

    @staticmethod
    def joined(first: Tensor, second: Tensor) -> Tensor:
        """Side by side along the channels."""
        return torch.cat([first, second], -1 if first.ndim == 3 else 1)

    def forward(
        self, x: Tensor, t: Tensor, cond: Any = None, source: Tensor | None = None, source_t: Tensor | None = None
    ) -> Tensor:
        """Logits (B, 1).

        Args:
            x: (B, ...) the point that is judged; t: (B,) its time. cond: its condition.
            source, source_t: the point it came from, and its time; both needed with ``pair``.

        Raises:
            InputError: no source.
        """
        if not self.pair:
            features = self.trunk(x, t, cond)
        else:
            if source is None or source_t is None:
                raise InputError("this discriminator judges pairs: give source=… and source_t=…, where x came from")
            both = self.trunk(torch.cat([x, source]), torch.cat([t, source_t]), join(cond, cond))
            features = [self.joined(*feature.chunk(2)) for feature in both]
        scores = [head(feature) for head, feature in zip(self.heads, features, strict=True)]
        return torch.stack(scores).mean(0)


class LevelDiscriminator(nn.Module):
    """Heads on several layers of a frozen network: a logit for each position of each layer.

    Samples are noised before they are judged, so that real and generated ones overlap; that is the caller's business.

    Args:
        network: the teacher's network. It is used as it is and is no part of this module: its owner freezes and moves it.
        sample: (x, t, cond) of a small batch, from which the heads learn their shapes.
        layers: see :class:`Trunk`; None: :func:`default_layers` with ``levels``.
        width: of the heads, see :class:`ResidualHead`.
        trainable: copy and train the trunk instead.

    Source: "Phased Consistency Models" (2024).
    """

    def __init__(
        self,
        network: nn.Module,
        sample: tuple[Any, ...],
        layers: Sequence[str] | None = None,
        *,
        width: int | None = None,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        chosen = default_layers(network, sample, levels=True) if layers is None else list(layers)
        self.trunk = Trunk(network, chosen, trainable=trainable)
        self.heads = nn.ModuleList(ResidualHead(f, width) for f in example_features(self.trunk, sample))

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """Logits (B, positions of all layers together)."""
        features = self.trunk(x, t, cond)
        return torch.cat([head(feature) for head, feature in zip(self.heads, features, strict=True)], 1)


def _width_of(feature: Tensor, width: int | None) -> int:
    return _geometry(feature)[1] if width is None else width


@torch.no_grad()
def example_features(trunk: Trunk, sample: tuple[Any, ...]) -> list[Tensor]:
    """What a trunk gives for a small batch, in evaluation mode; its modes stay as they were."""
    modes = [(module, module.training) for module in trunk.network.modules()]
    try:
        trunk.network.eval()
        features: list[Tensor] = trunk(*sample)
    finally:
        for module, mode in modes:
            module.training = mode
    return features
