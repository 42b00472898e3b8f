r"""Where a field is seen from while it is distilled: laws of poses, from which every epoch draws afresh.

All pools are centred on the middle of a box and give cameras with the lens, size, near and far of a model camera (its distortion is left
out: rays of a teacher need none). ``pool.epoch(number, seed)`` depends on its arguments and nothing else, so a run that is resumed sees
the same poses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from limbeck.core.data import mix_seed
from limbeck.core.errors import InputError
from limbeck.rendering.cameras import Cameras, look_at, orbit, orbit_positions

PoseLaw = Literal["fitted", "orbit", "outdoor", "forward-facing", "given"]
ORBIT_RADIUS = (3.2, 3.2)  # in half sides of the box: 4 times the scale 0.8 of the published scenes
OUTDOOR_RADIUS = (3.0, 4.0)
BAND = 5.0  # width of a band of elevations, degrees
GAP = 90.0  # degrees without any camera that count as a side which nobody has seen
STEEPEST = 89.0


@dataclass(frozen=True)
class CameraPool:
    """A law of poses.

    Attributes:
        lens: one camera whose lens, size, near and far all drawn cameras have.
        centre: (3,) what orbits go around and cameras look at.
        count: poses of an epoch; None: as many as the law has by itself.
    """

    lens: Cameras
    centre: Tensor
    count: int | None = None

    def epoch(self, number: int, seed: int = 0) -> Cameras:
        """The poses of epoch ``number``, in random order."""
        g = torch.Generator().manual_seed(mix_seed(seed, 461, number))
        drawn = self.draw(self.count, g)
        return drawn[torch.randperm(len(drawn), generator=g)]

    def draw(self, count: int | None, generator: torch.Generator) -> Cameras:
        """``count`` cameras (None: the law's own number)."""
        raise NotImplementedError

    def seen(self, positions: Tensor, **known: Tensor) -> Cameras:
        """Cameras at ``positions`` (N, 3) that look at the centre; ``known`` are azimuth, elevation and radius."""
        return placed(self.lens, look_at(positions, self.centre), **known)


@dataclass(frozen=True)
class BandedOrbit(CameraPool):
    r"""Orbits whose elevations come in bands, more poses in the low ones.

    For each whole degree a from ``bands[0]`` to ``bands[1]`` there are :math:`\lfloor (90 - a)/15 \rfloor + 1` poses, at elevations uniform in
    (a - 5, a) and azimuths uniform all around: 311 poses for 0 to 79. With another ``count`` the bands keep their shares.

    Attributes:
        radius: range of distances, world units. bands: lowest and highest a, degrees.

    Source: "One is All: Bridging the Gap Between Neural Radiance Fields Architectures with Progressive Volume Distillation" (its code).
    """

    radius: tuple[float, float] = ORBIT_RADIUS
    bands: tuple[int, int] = (0, 79)

    def __post_init__(self) -> None:
        check_range("radius", self.radius, 0.0)
        check_range("bands", self.bands, -80, 89)

    def tops(self) -> Tensor:
        """Upper ends (N,) of the bands in degrees, one entry for each pose."""
        a = torch.arange(self.bands[0], self.bands[1] + 1)
        return a.repeat_interleave((90 - a) // 15 + 1).float()

    def draw(self, count: int | None, generator: torch.Generator) -> Cameras:
        tops = self.tops()
        n = len(tops) if count is None else count
        # stratified, so that n = len(tops) takes each once
        place = (torch.arange(n) + torch.rand(n, generator=generator)) * (len(tops) / n)
        elevation = tops[place.long().clamp_max(len(tops) - 1)] - BAND * torch.rand(n, generator=generator)
        azimuth = 360 * torch.rand(n, generator=generator) - 180
        radius = uniform(self.radius, n, generator)
        positions = self.centre + orbit_positions(azimuth, elevation, radius)
        return self.seen(positions, azimuth=azimuth, elevation=elevation, radius=radius)


@dataclass(frozen=True)
class FittedOrbit(CameraPool):
    """An orbit as given cameras have it: distances between their least and greatest (and 0.01 beyond), elevations uniform between their 5th
    and 95th percentile.

    Azimuths are uniform all around, less the widest gap between neighbouring cameras if that is above 90 degrees: a field that was never seen
    from a side is not asked what it looks like from there (our decision).

    Attributes:
        like: the cameras. margin: of the distances, world units.

    Source: "PVD-AL: Progressive Volume Distillation with Active Learning for Efficient NeRF Architecture Conversion" (distances, elevations).
    """

    like: Cameras | None = None
    margin: float = 0.01

    def __post_init__(self) -> None:
        if self.like is None:
            raise InputError("an orbit is fitted to cameras: give like=…")

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Ranges of ``radius`` (world units), ``elevation`` and ``azimuth`` (degrees; its upper end may be above 180)."""
        assert self.like is not None
        offset = (self.like.positions - self.centre.to(self.like.positions)).double().cpu()
        radius = offset.norm(dim=-1)
        elevation = torch.rad2deg(torch.asin((offset[:, 2] / radius.clamp_min(1e-9)).clamp(-1, 1)))
        low, high = torch.quantile(elevation, torch.tensor([0.05, 0.95]).double()).clamp(-STEEPEST, STEEPEST).tolist()
        azimuth = torch.rad2deg(torch.atan2(offset[:, 1], offset[:, 0])).sort().values
        gaps = torch.cat([azimuth, azimuth[:1] + 360]).diff()
        around = (-180.0, 180.0)
        if len(azimuth) > 1 and float(gaps.max()) > GAP:
            first = azimuth.roll(-int(gaps.argmax()) - 1)[0].item()
            around = (first, first + 360 - float(gaps.max()))
        least = max(float(radius.min()) - self.margin, 1.01 * self.lens.near)
        return {"radius": (least, float(radius.max()) + self.margin), "elevation": (low, high), "azimuth": around}

    def draw(self, count: int | None, generator: torch.Generator) -> Cameras:
        n = len(self.like or ()) if count is None else count
        ranges = self.ranges()
        drawn = {name: uniform(ranges[name], n, generator) for name in ("azimuth", "elevation", "radius")}
        drawn["azimuth"] = (drawn["azimuth"] + 180) % 360 - 180
        return self.seen(self.centre + orbit_positions(**drawn), **drawn)


@dataclass(frozen=True)
class ForwardFacing(CameraPool):
    """Positions uniform in the bounding box of given cameras' centres, all looking at the centre.

    Attributes:
        like: the cameras. enlarge: sides of the box as a multiple of the cameras' own; 1.1 in the active-learning sequel.
    """

    like: Cameras | None = None
    enlarge: float = 1.0

    def __post_init__(self) -> None:
        if self.like is None:
            raise InputError("forward-facing poses lie among given cameras: give like=…")
        if not self.enlarge > 0:
            raise InputError(f"the cameras' box is enlarged by a factor above 0 (got {self.enlarge})")

    def draw(self, count: int | None, generator: torch.Generator) -> Cameras:
        assert self.like is not None
        n = len(self.like) if count is None else count
        place = self.like.positions.float().cpu()
        low, high = place.amin(0), place.amax(0)
        middle, half = (low + high) / 2, self.enlarge * (high - low) / 2
        return self.seen(middle + half * (2 * torch.rand(n, 3, generator=generator) - 1))


@dataclass(frozen=True)
class GivenCameras(CameraPool):
    """Nothing but the given cameras, all of them in every epoch (or ``count`` of them, different ones while there are enough).

    Attributes:
        like: the cameras.
    """

    like: Cameras | None = None

    def __post_init__(self) -> None:
        if self.like is None:
            raise InputError("there are no cameras to take poses from: give like=…")

    def draw(self, count: int | None, generator: torch.Generator) -> Cameras:
        assert self.like is not None
        total = len(self.like)
        n = total if count is None else count
        rounds = [torch.randperm(total, generator=generator) for _ in range(-(-n // total))]
        return placed(self.lens, self.like.c2w.cpu().float()[torch.cat(rounds)[:n]])


def camera_pool(
    law: PoseLaw,
    aabb: Tensor,
    like: Cameras | None = None,
    *,
    count: int | None = None,
    size: int | None = None,
    radius: tuple[float, float] | None = None,
    bands: tuple[int, int] | None = None,
) -> CameraPool:
    """A pool by name.

    Args:
        law: ``fitted`` to given cameras, ``orbit`` (elevations -5 to 79 degrees), ``outdoor`` (elevations 0 to 19), ``forward-facing`` among
            given cameras, or the ``given`` cameras themselves.
        aabb: (2, 3) box of what is seen; its middle is the centre, and distances of ``orbit`` and ``outdoor`` count in its half sides.
        like: cameras whose lens is taken, and that some laws need; None: a field of view of 45 degrees.
        count: poses of an epoch; None: the law's own number.
        size: longer side of the virtual pictures in pixels; None: that of ``like``, or 64.
        radius, bands: of ``orbit`` and ``outdoor``, where they differ from the published ones.

    Raises:
        InputError: an unknown law, one that needs cameras without any, numbers out of range.
    """
    if count is not None and count < 1:
        raise InputError(f"an epoch has 1 pose or more (got {count})")
    box = aabb.detach().float().cpu()
    if law in ("fitted", "forward-facing", "given") and like is None:
        raise InputError(f"poses '{law}' need cameras: give them, or take 'orbit' or 'outdoor'")
    centre, half = box.mean(0), float((box[1] - box[0]).max()) / 2
    lens = model_lens(like, size)
    if law == "fitted":
        return FittedOrbit(lens, centre, count, like)
    if law == "forward-facing":
        return ForwardFacing(lens, centre, count, like)
    if law == "given":
        return GivenCameras(lens, centre, count, like)
    if law not in ("orbit", "outdoor"):
        raise InputError(f"poses are fitted, orbit, outdoor, forward-facing or given, not '{law}'")
    usual, heights = (ORBIT_RADIUS, (0, 79)) if law == "orbit" else (OUTDOOR_RADIUS, (5, 19))
    reach = (usual[0] * half, usual[1] * half) if radius is None else radius
    return BandedOrbit(lens, centre, count, reach, heights if bands is None else bands)


def model_lens(like: Cameras | None, size: int | None = None) -> Cameras:
    """One camera with the mean focal length of ``like`` (45 degrees where there is none), the picture's middle as its principal point."""
    if like is None:
        return orbit([0.0], 0.0, 3.0, 45.0, size or 64, size or 64)
    width, height = like.width, like.height
    eye = torch.eye(4)[None]
    one = Cameras(
        eye, like.fx.mean().cpu().float(), like.fy.mean().cpu().float(), torch.tensor(width / 2), torch.tensor(height / 2),
        width, height, like.near, like.far,
    )  # fmt: skip
    if size is None:
        return one
    scale = size / max(width, height)
    return one.resized(max(1, round(width * scale)), max(1, round(height * scale)))


def placed(lens: Cameras, c2w: Tensor, **known: Tensor) -> Cameras:
    """Cameras at poses (N, 4, 4) with the lens of the single camera ``lens``."""
    n = len(c2w)
    pinhole = {name: getattr(lens, name).expand(n) for name in ("fx", "fy", "cx", "cy")}
    bare = {"distortion": None, "times": None, "ids": None, "azimuth": None, "elevation": None, "radius": None}
    return replace(lens, c2w=c2w, **{**pinhole, **bare, **known})


def uniform(span: Sequence[float], count: int, generator: torch.Generator) -> Tensor:
    """(count,) numbers uniform in a range."""
    return span[0] + (span[1] - span[0]) * torch.rand(count, generator=generator)


def check_range(name: str, span: Sequence[float], least: float, most: float = float("inf")) -> None:
    """Raise an :class:`InputError` unless low <= high lie in (least, most]."""
    if len(span) != 2 or not least < span[0] <= span[1] <= most:
        raise InputError(f"{name} is a range (low, high) above {least} with low <= high (got {tuple(span)})")
