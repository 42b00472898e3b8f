"""A ring of recent samples, for networks that learn from what was made a little while ago."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class RecentSamples(nn.Module):
    """The last samples with their cameras and conditions, in a ring; part of checkpoints.

    Args:
        size: how many. shape: of one.
    """

    images: Tensor
    cameras: Tensor
    classes: Tensor
    count: Tensor

    def __init__(self, size: int, shape: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("images", torch.zeros(size, *shape))
        self.register_buffer("cameras", torch.zeros(size, 16))
        self.register_buffer("classes", torch.zeros(size, dtype=torch.long))
        self.register_buffer("count", torch.tensor(0))
        self._kinds = (False, False)
        self._cond: Any = None

    @torch.no_grad()
    def add(self, x: Tensor, camera: Tensor | None = None, cond: Any = None) -> None:
        """Keep samples (B, ...), their cameras (B, 16) and plain conditions in the place of the oldest."""
        rows = (int(self.count) + torch.arange(len(x), device=x.device)) % len(self.images)
        self.images[rows] = x.detach().to(self.images)
        classes = isinstance(cond, Tensor) and cond.ndim == 1 and not cond.is_floating_point()
        self._kinds, self._cond = (camera is not None, classes), cond
        if camera is not None:
            self.cameras[rows] = camera.to(self.cameras)
        if classes:
            self.classes[rows] = cond.to(self.classes)
        self.count += len(x)

    def draw(self, count: int) -> tuple[Tensor, Tensor | None, Any]:
        """Random ones: images, cameras or None, plain conditions (embeddings are the same for all and are those of the last step)."""
        rows = torch.randint(min(int(self.count), len(self.images)), (count,))
        camera, classes = self._kinds
        return self.images[rows], self.cameras[rows] if camera else None, self.classes[rows] if classes else self._cond
