r"""Densification of 3-D Gaussian splatting: where the centres of Gaussians keep being pulled, small ones are cloned and large ones are split;
clear and huge ones are removed; opacities are set back now and then.

Source: "3D Gaussian Splatting for Real-Time Radiance Field Rendering", section 5.2 and the released code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.rendering.anchor_growing import picture_gradients
from limbeck.rendering.gaussians import Gaussians, rotations
from limbeck.rendering.rows import any_count, change_rows, set_rows
from limbeck.rendering.splatting import Splat
from limbeck.rendering.views import View


@dataclass(frozen=True)
class DensificationRule:
    """The schedule and the thresholds.

    Attributes:
        every, begin, end: steps; changes happen at multiples of ``every`` after ``begin`` and until ``end``. reset_every: between resets.
        gradient: mean length of the centre's gradient, in units of half a picture, above which a Gaussian is cloned or split.
        small: fraction of the extent up to which a Gaussian is cloned; above it, it is split. parts, shrink: of a split.
        min_opacity: Gaussians below it are removed. large: fraction of the extent above which they are removed, once opacities have
            been reset. reset_opacity: the ceiling that a reset sets. most: no more Gaussians than so many are made.
    """

    every: int = 100
    begin: int = 500
    end: int = 15_000
    reset_every: int = 3000
    gradient: float = 2e-4
    small: float = 0.01
    parts: int = 2
    shrink: float = 1.6
    min_opacity: float = 0.005
    large: float = 0.1
    reset_opacity: float = 0.01
    most: int = 10_000_000

    def __post_init__(self) -> None:
        if self.every < 1 or self.parts < 2 or self.shrink <= 1:
            raise InputError("densification happens every step or more rarely, and splits into 2 or more smaller parts")
        if not 0 < self.min_opacity < self.reset_opacity < 1:
            raise InputError(
                "opacities obey 0 < min_opacity < reset_opacity < 1, or every reset would remove everything"
            )


class Change(NamedTuple):
    """How many Gaussians were cloned, split and removed."""

    cloned: int
    split: int
    pruned: int


class Densification:
    """Accumulates what is seen of Gaussians and changes their number; kept in checkpoints.

    In a loop: draw, ``backward()``, :meth:`record`, the optimiser's step, then :meth:`step`.

    Args:
        gaussians: they then load states of any number of Gaussians. extent: radius of the scene (the cameras' spread), world units.
        rule: when and how.
    """

    def __init__(self, gaussians: Gaussians, extent: float, rule: DensificationRule | None = None) -> None:
        if not extent > 0:
            raise InputError(f"a scene's extent is above 0 (got {extent})")
        self.gaussians, self.extent, self.rule = gaussians, extent, rule or DensificationRule()
        self.resets = 0
        self._clear()
        any_count(gaussians)

    def _clear(self) -> None:
        zeros = self.gaussians.means.detach().new_zeros(len(self.gaussians))
        self.gradient, self.seen = zeros, zeros.clone()

    @torch.no_grad()
    def record(self, splat: Splat, view: View) -> None:
        """After the backward pass of a picture."""
        visible = (splat.radii > 0).to(self.seen)
        self.gradient += picture_gradients(splat, view).to(self.gradient) * visible
        self.seen += visible

    def step(self, number: int, optimizer: torch.optim.Optimizer | None = None) -> Change | None:
        """What the rule wants after update ``number`` (from 1); None: nothing."""
        rule, found = self.rule, None
        if rule.begin < number <= rule.end and number % rule.every == 0:
            found = self.densify(optimizer)
        if number <= rule.end and number % rule.reset_every == 0:
            self.reset(optimizer)
        return found

    @torch.no_grad()
    def densify(self, optimizer: torch.optim.Optimizer | None = None) -> Change:
        """Clone, split and prune now, and begin to accumulate anew."""
        found, rule, count = self.gaussians, self.rule, len(self.gaussians)
        pulled = self.gradient / self.seen.clamp_min(1) >= rule.gradient
        widest = found.scales.amax(1)
        room = max(0, rule.most - count)
        pulled &= pulled.cumsum(0) * max(1, rule.parts - 1) <= room
        clone = pulled & (widest <= rule.small * self.extent)
        split = pulled & ~clone
        added = {name: value[clone] for name, value in found.named_parameters()}
        parts = self._parts(split)
        added = {name: torch.cat([value, parts[name]]) for name, value in added.items()}
        change_rows(found, ~split, added, optimizer)
        gone = found.opacities < rule.min_opacity
        if self.resets:
            gone |= found.scales.amax(1) > rule.large * self.extent
        if bool(gone.all()):
            gone = torch.zeros_like(gone)  # an empty scene learns nothing any more
        change_rows(found, ~gone, None, optimizer)
        self._clear()
        return Change(int(clone.sum()), int(split.sum()), int(gone.sum()))

    def _parts(self, split: Tensor) -> dict[str, Tensor]:
        """Smaller Gaussians at places drawn from those that they replace, with torch's random state."""
        found, rule = self.gaussians, self.rule
        parts = {
            name: value[split].repeat(rule.parts, *[1] * (value.ndim - 1)) for name, value in found.named_parameters()
        }
        noise = torch.randn(parts["means"].shape).to(parts["means"]) * parts["log_scales"].exp()
        parts["means"] = parts["means"] + (rotations(parts["quats"]) @ noise[..., None])[..., 0]
        parts["log_scales"] = parts["log_scales"] - math.log(rule.shrink)
        return parts

    @torch.no_grad()
    def reset(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Lower all opacities to ``reset_opacity`` at most, and forget their running means."""
        ceiling = math.log(self.rule.reset_opacity / (1 - self.rule.reset_opacity))
        logits = self.gaussians.opacity_logits
        set_rows(optimizer, logits, logits.detach().clamp_max(ceiling))
        self.resets += 1

    def state_dict(self) -> dict[str, Any]:
        return {"gradient": self.gradient.clone(), "seen": self.seen.clone(), "resets": self.resets}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gradient = state["gradient"].to(self.gaussians.means)
        self.seen, self.resets = state["seen"].to(self.gaussians.means), int(state["resets"])
