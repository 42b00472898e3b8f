"""A small convolutional U-Net that denoises pictures of objects, and can be told a class, a control picture and a camera."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import InputError
from limbeck.networks.base import check_sizes

GROUPS = 4
VECTOR = 64
"""Width of the vector that says what time it is, and everything else that is one for the whole picture."""
HIGHEST = 64.0


class FiLMBlock(nn.Module):
    r"""Residual block of two 3x3 convolutions, :math:`x + W_2\,\mathrm{silu}(\mathrm{GN}(W_1\,\mathrm{silu}(\mathrm{GN}(x)))(1 + a) + b)`.

    a and b, one number a channel, are linear in a vector (B, 64). A 1x1 convolution changes the width where it must.
    """

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, inner)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.modulation = nn.Linear(VECTOR, 2 * outer)
        self.norm2 = nn.GroupNorm(GROUPS, outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.skip: nn.Module = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        scale, shift = self.modulation(vector)[..., None, None].chunk(2, 1)
        h = self.norm2(self.conv1(F.silu(self.norm1(x)))) * (1 + scale) + shift
        found: Tensor = self.skip(x) + self.conv2(F.silu(h))
        return found


class ViewUNet(nn.Module):
    """``(x (B, C, H, W), time (B,), cond) -> (B, C, H, W)`` at two resolutions, for pictures with even sides of 8 or more.

    The condition is class ids (B,) in 0 … K - 1, K or None for no class; or a mapping with ``class_labels`` (B,) and ``control``
    (B, E, H, W) in the pictures' scale, either of which may be left out (no class; zeros). The output starts at zero.

    Args:
        shape: (C, H, W) of a sample; other even sizes are taken too.
        width: channels at full resolution, twice as many at half; a multiple of 4.
        blocks: residual blocks at half resolution, besides one before and one after at full.
        num_classes: K; None: no classes.
        extra_channels: E, of the control picture (normals, say).
        time_scale: 1e-3 for times that go to 1000; 1 for ln(sigma)/4.
        time_features: half sines, half cosines, of ``time * time_scale`` at frequencies from 1 to 64, evenly in their logarithm.

    Attributes:
        time_embedding: gives the vector (B, 64) to which the class's is added; another embedding can be added to its output by a hook.

    Raises:
        InputError: sizes that are odd or too small, a width that is no multiple of 4.
    """

    frequencies: Tensor

    def __init__(
        self,
        shape: Sequence[int] = (3, 16, 16),
        width: int = 24,
        num_classes: int | None = None,
        extra_channels: int = 0,
        time_scale: float = 1e-3,
        blocks: int = 1,
        time_features: int = 16,
    ) -> None:
        super().__init__()
        self.shape, _ = check_sizes(shape, 1 if num_classes is None else num_classes)
        if len(self.shape) != 3:
            raise InputError(f"a U-Net takes pictures (C, H, W), not samples of shape {self.shape}: use an mlp network")
        _check_sides(*self.shape[1:])
        if width < GROUPS or width % GROUPS or time_features < 2 or time_features % 2:
            raise InputError(
                f"a view U-Net's width is a multiple of {GROUPS} and its time features are even (got {width} and {time_features})"
            )
        if extra_channels < 0 or blocks < 0:
            raise InputError(f"extra channels and blocks are 0 or more (got {extra_channels} and {blocks})")
        self.spec: dict[str, Any] = {
            "shape": list(self.shape),
            "width": width,
            "num_classes": num_classes,
            "extra_channels": extra_channels,
            "time_scale": time_scale,
            "blocks": blocks,
            "time_features": time_features,
        }
        self.num_classes, self.extra_channels, self.time_scale = num_classes, extra_channels, time_scale
        channels, half = self.shape[0], time_features // 2
        self.register_buffer(
            "frequencies", torch.exp(torch.linspace(0, math.log(HIGHEST), half)), persistent=False
        )  # fmt: skip
        self.time_embedding = nn.Sequential(nn.Linear(time_features, VECTOR), nn.SiLU(), nn.Linear(VECTOR, VECTOR))
        self.class_embedding = None if num_classes is None else nn.Embedding(num_classes + 1, VECTOR)
        self.first = nn.Conv2d(channels + extra_channels, width, 3, padding=1)
        self.enter = FiLMBlock(width, width)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = nn.ModuleList(FiLMBlock(2 * width, 2 * width) for _ in range(blocks))
        self.up = nn.Conv2d(2 * width, width, 3, padding=1)
        self.leave = FiLMBlock(2 * width, width)
        self.norm = nn.GroupNorm(GROUPS, width)
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)
        for kernel in self.parameters():  # channels last: a third faster on processors
            if kernel.ndim == 4:
                kernel.data = kernel.data.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | Mapping[str, Tensor] | None = None) -> Tensor:
        """See the class.

        Raises:
            InputError: pictures of another number of channels or with odd sides, class ids out of range, a condition it does not take.
        """
        if x.ndim != 4 or x.shape[1] != self.shape[0]:
            raise InputError(f"the network takes pictures (B, {self.shape[0]}, H, W), not {tuple(x.shape)}")
        _check_sides(*x.shape[2:])
        classes, control = self._parts(cond, x)
        kind = self.first.weight.dtype
        angles = time.to(self.frequencies.dtype)[:, None] * self.time_scale * self.frequencies
        vector = self.time_embedding(torch.cat([angles.sin(), angles.cos()], 1).to(kind))
        if self.class_embedding is not None:
            vector = vector + self.class_embedding(classes)
        vector = F.silu(vector)
        full = self.enter(self.first(x if control is None else torch.cat([x, control.to(x)], 1)), vector)
        half = self.down(full)
        for block in self.middle:
            half = block(half, vector)
        wide = F.interpolate(self.up(half), scale_factor=2, mode="nearest")
        found: Tensor = self.last(F.silu(self.norm(self.leave(torch.cat([wide, full], 1), vector))))
        return found

    def _parts(self, cond: Tensor | Mapping[str, Tensor] | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Class ids (B,), where there are classes, and the control picture, where it takes one."""
        given = dict(cond) if isinstance(cond, Mapping) else {} if cond is None else {"class_labels": cond}
        unknown = set(given) - {"class_labels", "control"}
        if unknown:
            raise InputError(f"a view U-Net's condition has class_labels and control, not {', '.join(sorted(unknown))}")
        classes, control = given.get("class_labels"), given.get("control")
        if self.num_classes is None:
            if classes is not None:
                raise InputError("the network has no classes: it takes no class ids")
        elif classes is None:
            classes = torch.full((len(x),), self.num_classes, device=x.device)
        else:
            self._check_ids(classes, len(x))
        wanted = (len(x), self.extra_channels, *x.shape[2:])
        if control is None:
            return classes, x.new_zeros(wanted) if self.extra_channels else None
        if tuple(control.shape) != wanted or not self.extra_channels:
            takes = f"{wanted}" if self.extra_channels else "none (extra_channels is 0)"
            raise InputError(f"the network takes a control picture of shape {takes}, not {tuple(control.shape)}")
        return classes, control

    def _check_ids(self, classes: Tensor, count: int) -> None:
        assert self.num_classes is not None
        if not isinstance(classes, Tensor) or classes.is_floating_point() or classes.shape != (count,):
            raise InputError(f"the condition must be class ids ({count},), integers")
        if torch.compiler.is_compiling() or torch._C._functorch.is_batchedtensor(classes):
            return
        low, high = int(classes.min()), int(classes.max())
        if low < 0 or high > self.num_classes:
            raise InputError(
                f"class {low if low < 0 else high} was never seen by the network: ids go from 0 to {self.num_classes - 1}, "
                f"{self.num_classes} is 'no class'"
            )


def _check_sides(height: int, width: int) -> None:
    if min(height, width) < 8 or height % 2 or width % 2:
        raise InputError(
            f"a view U-Net takes pictures with even sides of 8 pixels or more, not {height} x {width}: resize them"
        )


_NAME = re.compile(r"view-unet(?:-w([0-9]+))?")


def named_view_unet(name: str, shape: Sequence[int], num_classes: int | None, time_scale: float) -> ViewUNet | None:
    """The network that ``view-unet[-w<width>]`` names; None for other names."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    sizes = {"width": int(found[1])} if found[1] else {}
    return ViewUNet(shape, num_classes=num_classes, time_scale=time_scale, **sizes)
