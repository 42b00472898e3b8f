"""Which rays to train on: pixels drawn at random, more often where something is, or again where a student was wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.rendering.cameras import Cameras
from limbeck.rendering.rays import Rays, intersect_box

Strategy = Literal["uniform", "foreground", "hard-pool"]


@dataclass
class RayBatch:
    """Rays and what is known of them.

    Attributes:
        ids: (R,) number of the camera, -1 for rays of cameras that the sampler no longer has. pixels: (R, 2) as (column, row).
        rays: origins and directions (R, 3). colours: (R, 3) in [0, 1] of the pictures, or None. alpha: (R,) of the pictures, or None.
        slots: (Q,) where the last Q rays stand in the hard pool; empty without one.
    """

    ids: Tensor
    pixels: Tensor
    rays: Rays
    colours: Tensor | None
    alpha: Tensor | None
    slots: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def fresh(self) -> int:
        """How many of the rays, the first ones, do not come from the pool."""
        return len(self) - len(self.slots)


class HardPool:
    """Rays that were rendered worst, kept until they have been shown again.

    Rays are appended until the pool is full. From then on what is drawn from it is overwritten by what is put in next.

    Args:
        capacity: rays. channels: further numbers kept with each ray.

    Source: "PVD-AL: Progressive Volume Distillation with Active Learning for Efficient NeRF Architecture Conversion".
    """

    def __init__(self, capacity: int, channels: int, device: torch.device | None = None) -> None:
        self.capacity, self.count = capacity, 0
        self.ids = torch.zeros(capacity, dtype=torch.long, device=device)
        self.values = torch.zeros(capacity, channels, device=device)

    @property
    def full(self) -> bool:
        return self.count == self.capacity

    def draw(self, count: int) -> Tensor:
        """Different slots (at most ``count``), from the global random state; none until the pool is full."""
        if not self.full:
            return torch.zeros(0, dtype=torch.long, device=self.ids.device)
        return torch.randperm(self.capacity)[:count].to(self.ids.device)

    def put(self, ids: Tensor, values: Tensor, slots: Tensor) -> None:
        """Append rays, worst first, while there is room; once it is full, overwrite ``slots`` with them."""
        if not self.full:
            slots = torch.arange(self.count, min(self.capacity, self.count + len(ids)), device=self.ids.device)
            self.count += len(slots)
        kept = min(len(slots), len(ids))
        self.ids[slots[:kept]], self.values[slots[:kept]] = ids[:kept], values[:kept]

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "ids": self.ids[: self.count].clone(), "values": self.values[: self.count].clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a pool of the same capacity.

        Raises:
            InputError: more rays than fit, or of another width.
        """
        count, values = int(state["count"]), state["values"]
        if count > self.capacity or values.shape[1:] != self.values.shape[1:]:
            raise InputError(
                f"a pool of {self.capacity} rays of {self.values.shape[1]} numbers cannot take up {count} of {tuple(values.shape[1:])}: "
                "resume with the same settings"
            )
        self.count = count
        self.ids[:count], self.values[:count] = state["ids"].to(self.ids), values.to(self.values)


class RaySampler:
    """Draws rays from cameras, and the colours of their pixels where there are pictures.

    All draws come from torch's global random state on the CPU, whatever the device, so that a resumed run continues with the same rays.

    Strategies:
        ``uniform``: every pixel of every camera alike. ``foreground``: a share of the rays from pixels that show something, the others
        uniform: those with ``alpha`` > 0, or, without it, whose rays meet ``aabb``; all rays are uniform where none does. ``hard-pool``: uniform, and once the pool of hard rays
        is full ``ratio`` times as many from it on top; :meth:`update` tells it which rays of a batch were rendered worst.

    Args:
        cameras: what is drawn from. images: (N, H, W, 3) in [0, 1] or bytes, or None, as where a teacher renders the targets.
        rays: R of each draw. alpha: (N, H, W) of the pictures. aabb: (2, 3) box of what is to be seen.
        share: of foreground rays. ratio: of hard rays to R. capacity: of the pool in rays; None: 15 R.

    Raises:
        InputError: another strategy, shapes that do not fit, numbers out of range, ``foreground`` without alpha and box.
    """

    def __init__(
        self,
        cameras: Cameras,
        images: Tensor | None = None,
        rays: int = 256,
        strategy: Strategy = "uniform",
        *,
        alpha: Tensor | None = None,
        aabb: Tensor | None = None,
        share: float = 0.9,
        ratio: float = 0.1,
        capacity: int | None = None,
    ) -> None:
        if strategy not in ("uniform", "foreground", "hard-pool"):
            raise InputError(f"rays are drawn uniform, foreground or hard-pool, not '{strategy}'")
        if rays < 1 or not 0 <= share <= 1 or not 0 < ratio <= 1 or (capacity is not None and capacity < 1):
            raise InputError(
                f"a ray sampler needs rays and capacity of at least 1, share in [0, 1] and ratio in (0, 1] "
                f"(got {rays}, {capacity}, {share} and {ratio})"
            )
        if strategy == "foreground" and alpha is None and aabb is None:
            raise InputError("foreground rays need the pictures' alpha or the scene's box: give alpha or aabb")
        self.count, self.strategy, self.aabb = rays, strategy, aabb
        self.share, self.ratio, self.hard = share, ratio, max(1, int(ratio * rays))
        self.pool: HardPool | None = None
        self.use(cameras, images, alpha)
        if strategy == "hard-pool":
            self.pool = HardPool(15 * rays if capacity is None else capacity, 8 + self._extra, cameras.c2w.device)

    def use(self, cameras: Cameras, images: Tensor | None = None, alpha: Tensor | None = None) -> None:
        """Draw from other cameras from now on; the pool of hard rays stays.

        Raises:
            InputError: pictures that do not fit the cameras, or that come and go while there is a pool.
        """
        shape = (len(cameras), cameras.height, cameras.width)
        for name, value, wanted in (("images", images, (*shape, 3)), ("alpha", alpha, shape)):
            if value is not None and tuple(value.shape) != wanted:
                raise InputError(f"{name} of these cameras are {wanted}, not {tuple(value.shape)}")
        extra = 3 * (images is not None) + (alpha is not None)
        if self.pool is not None:
            if self.pool.values.shape[1] != 8 + extra:
                raise InputError("a pool of hard rays keeps pictures' colours or none: give images and alpha as before")
            self.pool.ids.fill_(-1)
        self.cameras, self.images, self.alpha, self._extra = cameras, images, alpha, extra
        self._seen: Tensor | None = None
        if self.strategy == "foreground":
            self._seen = self._foreground()

    def draw(self, camera: int | None = None) -> RayBatch:
        """The next rays: R of them, and those from the pool.

        Args:
            camera: take the R rays from this one; None: from all.

        Raises:
            InputError: no such camera.
        """
        width, area = self.cameras.width, self.cameras.width * self.cameras.height
        if camera is not None and not 0 <= camera < len(self.cameras):
            raise InputError(f"a camera's number is 0 to {len(self.cameras) - 1} (got {camera})")
        first, end = (0, len(self.cameras) * area) if camera is None else (camera * area, (camera + 1) * area)
        flat = torch.randint(first, end, (self.count,))
        if self._seen is not None:
            low, high = torch.searchsorted(self._seen, torch.tensor([first, end])).tolist()
            if high > low:
                chosen = self._seen[torch.randint(low, high, (self.count,))]
                flat = torch.where(torch.rand(self.count) < self.share, chosen, flat)
        device = self.cameras.c2w.device
        ids, rest = (flat // area).to(device), flat % area
        pixels = torch.stack([rest % width, rest // width], 1).to(device)
        rays = self.cameras.rays(ids, pixels)
        colours = None if self.images is None else self._colours(flat)
        alpha = None if self.alpha is None else self.alpha.reshape(-1)[flat.to(self.alpha.device)].to(device)
        slots = torch.zeros(0, dtype=torch.long, device=device)
        if self.pool is None or not len(slots := self.pool.draw(self.hard)):
            return RayBatch(ids, pixels, rays, colours, alpha, slots)
        kept = self.pool.values[slots].to(rays.origins.dtype)
        return RayBatch(
            torch.cat([ids, self.pool.ids[slots]]),
            torch.cat([pixels, kept[:, 6:8].long()]),
            Rays(torch.cat([rays.origins, kept[:, :3]]), torch.cat([rays.directions, kept[:, 3:6]])),
            None if colours is None else torch.cat([colours, kept[:, 8:11]]),
            None if alpha is None else torch.cat([alpha, kept[:, -1]]),
            slots,
        )

    def update(self, batch: RayBatch, errors: Tensor) -> None:
        """Put the ``ratio`` R worst of a batch's fresh rays into the pool; without a pool nothing happens.

        Args:
            batch: what :meth:`draw` gave. errors: (R,) or one for every ray of the batch, for instance sum |C_S - C_T| over colours.

        Raises:
            InputError: another number of errors, or some that are not finite.
        """
        if errors.shape not in ((batch.fresh,), (len(batch),)):
            raise InputError(f"a batch of {len(batch)} rays needs as many errors, not {tuple(errors.shape)}")
        if self.pool is None:
            return
        found = errors.detach()[: batch.fresh]
        if not bool(found.isfinite().all()):
            raise InputError(
                "the rays' errors hold NaN or infinity: the training has diverged; lower the learning rate"
            )
        worst = found.topk(min(self.hard, len(found))).indices
        parts = [batch.rays.origins, batch.rays.directions, batch.pixels]
        parts += [] if batch.colours is None else [batch.colours]
        parts += [] if batch.alpha is None else [batch.alpha[:, None]]
        values = torch.cat([part[worst].float() for part in parts], 1)
        self.pool.put(batch.ids[worst], values, batch.slots)

    def state_dict(self) -> dict[str, Any]:
        """The pool; random states are the engine's, cameras the caller's."""
        return {} if self.pool is None else {"pool": self.pool.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` stood.

        Raises:
            InputError: the pool does not fit these settings.
        """
        if (self.pool is None) != ("pool" not in state):
            raise InputError("the state of another strategy of ray sampling: resume with the same settings")
        if self.pool is not None:
            self.pool.load_state_dict(state["pool"])

    def _colours(self, flat: Tensor) -> Tensor:
        assert self.images is not None
        found = self.images.reshape(-1, 3)[flat.to(self.images.device)].to(self.cameras.c2w.device)
        return found.float() / 255 if found.dtype == torch.uint8 else found

    def _foreground(self) -> Tensor:
        """Numbers of the pixels that show something, ascending."""
        if self.alpha is not None:
            return (self.alpha > 0).flatten().nonzero()[:, 0].cpu()
        assert self.aabb is not None
        box, cameras = self.aabb, self.cameras
        hits = [intersect_box(cameras.rays(i), box, cameras.near, cameras.far)[2] for i in range(len(cameras))]
        return torch.cat(hits).nonzero()[:, 0].cpu()
