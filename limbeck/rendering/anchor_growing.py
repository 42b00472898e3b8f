r"""Growing and pruning of anchors.

A Gaussian whose centre on the picture keeps being pulled (mean length of its gradient, in units of half a picture) marks a place where
something is missing: if its voxel is empty, on one of three grids of falling size and rising threshold, an anchor is put there. Anchors whose
Gaussians stay clear are removed. At level i

.. math:: \|\nabla u\| \ge 2^i\,\tau,\qquad \text{side} = 4^{\,2-i}\,\epsilon,\qquad \text{chosen with probability } 1 - 2^{-(i+1)}

Source: "Scaffold-GS: Structured 3D Gaussians for View-Adaptive Rendering", section 3.3, with the released code's random choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.rendering.anchors import Anchors, Drawn
from limbeck.rendering.rows import change_rows
from limbeck.rendering.splatting import Splat
from limbeck.rendering.views import View

LEVELS = 3


def picture_gradients(splat: Splat, view: View) -> Tensor:
    """Lengths (G,) of the gradients of the centres, in units of half a picture; the image must have been differentiated.

    Raises:
        InputError: it was not.
    """
    grad = splat.means2d.grad
    if grad is None:
        raise InputError("the centres have no gradient: call backward() on a loss of the picture first")
    half = grad.new_tensor([view.width / 2, view.height / 2])
    return (grad.reshape(-1, 2) * half).norm(dim=1)


@dataclass(frozen=True)
class GrowingRule:
    """When anchors come and go.

    Attributes:
        every: steps between changes. voxel: side of the finest grid, world units. gradient: threshold of the coarsest grid.
        success: fraction of ``every`` steps that an anchor must have been seen in before it is judged.
        min_opacity: mean summed opacity below which an anchor is removed. most: no growth beyond so many anchors.
    """

    every: int = 100
    voxel: float = 0.01
    gradient: float = 2e-4
    success: float = 0.8
    min_opacity: float = 0.005
    most: int = 1_000_000

    def __post_init__(self) -> None:
        if self.voxel <= 0 or self.every < 1:
            raise InputError(f"growing needs a voxel and an interval above 0 (got {self.voxel}, {self.every})")


class AnchorGrowing:
    """What has been seen of each anchor since it was last judged; kept in checkpoints.

    Args:
        anchors: at the beginning; later ones may be more or fewer, as :meth:`change` makes them. rule: when they come and go.
    """

    def __init__(self, anchors: Anchors, rule: GrowingRule) -> None:
        self.rule = rule
        count, k = anchors.offsets.shape[:2]
        make = anchors.positions.new_zeros
        self.seen, self.opacity = make(count), make(count)
        self.drawn, self.gradient = make(count, k), make(count, k)

    @torch.no_grad()
    def record(self, found: Drawn, view: View) -> None:
        """After the backward pass of a picture."""
        which = found.which
        self.seen[which] += 1
        self.opacity[which] += found.attributes.opacities.detach().clamp_min(0).sum(1).to(self.opacity)
        lengths = picture_gradients(found.splat, view)
        touched = found.splat.radii > 0
        drawn, gradient = torch.zeros_like(self.drawn[which]), torch.zeros_like(self.gradient[which])
        drawn[found.drawn] = touched.to(drawn)
        gradient[found.drawn] = (lengths * touched).to(gradient)
        self.drawn[which] += drawn
        self.gradient[which] += gradient

    @torch.no_grad()
    def change(self, anchors: Anchors, optimizer: torch.optim.Optimizer | None = None) -> tuple[int, int]:
        """Grow, then prune. New anchors take the largest feature of the Gaussians that asked for them.

        Returns:
            how many anchors came, and how many went.
        """
        rule = self.rule
        enough = rule.every * rule.success
        known = self.drawn > 0.5 * enough
        mean = torch.where(known, self.gradient / self.drawn.clamp_min(1), torch.zeros_like(self.gradient))
        asked, old = anchors.points(), len(anchors)
        for level in range(LEVELS):
            lucky = torch.rand(mean.shape).to(mean) > 0.5 ** (level + 1)
            chosen = known & (mean >= rule.gradient * 2**level) & lucky
            if len(anchors) < rule.most:
                self._put(
                    anchors, asked[chosen], chosen.nonzero()[:, 0], rule.voxel * 4 ** (LEVELS - 1 - level), optimizer
                )
        came = len(anchors) - old
        self.drawn[known], self.gradient[known] = 0, 0
        judged = self.seen > enough
        gone = judged & (self.opacity < rule.min_opacity * self.seen)
        if bool(gone.all()):
            gone = torch.zeros_like(gone)  # an empty scene learns nothing any more
        self.opacity[judged], self.seen[judged] = 0, 0
        keep = torch.cat([~gone, gone.new_ones(came)])
        change_rows(anchors, keep, None, optimizer)
        for name in ("seen", "opacity", "drawn", "gradient"):
            value = getattr(self, name)[~gone]
            setattr(self, name, torch.cat([value, value.new_zeros(came, *value.shape[1:])]))
        return came, int(gone.sum())

    def _put(
        self, anchors: Anchors, places: Tensor, owners: Tensor, side: float, optimizer: torch.optim.Optimizer | None
    ) -> None:
        """New anchors in the voxels of ``places`` that hold none yet."""
        if not len(places):
            return
        cells, inverse = torch.unique((places / side).round(), dim=0, return_inverse=True)
        taken = (anchors.positions / side).round()
        together, index = torch.unique(torch.cat([taken, cells]), dim=0, return_inverse=True)
        occupied = torch.zeros(len(together), dtype=torch.bool, device=places.device)
        occupied[index[: len(taken)]] = True
        free = ~occupied[index[len(taken) :]]
        if not bool(free.any()):
            return
        features = anchors.features.detach()[owners]
        best = features.new_full((len(cells), features.shape[1]), -torch.inf)
        best = best.scatter_reduce(0, inverse[:, None].expand_as(features), features, "amax")
        count = int(free.sum())
        added = {
            "positions": cells[free] * side,
            "features": best[free],
            "offsets": features.new_zeros(count, *anchors.offsets.shape[1:]),
            "log_scales": features.new_tensor(side).log().expand(count, 6),
        }
        change_rows(anchors, torch.ones(len(anchors), dtype=torch.bool, device=places.device), added, optimizer)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).clone() for name in ("seen", "opacity", "drawn", "gradient")}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | None = None) -> None:
        for name, value in state.items():
            setattr(self, name, value.to(getattr(self, name).device if device is None else device))
