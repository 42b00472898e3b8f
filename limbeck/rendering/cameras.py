r"""Cameras: poses with OpenGL axes, pinholes with an optional lens, orbits, and translations from other conventions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.errors import InputError
from limbeck.rendering.rays import Rays, camera_directions, distort, pixel_grid

TOLERANCE = 1e-3  # how far from orthonormal a rotation may be; files written with few digits stay below it
PER_CAMERA = ("c2w", "fx", "fy", "cx", "cy", "distortion", "times", "ids", "azimuth", "elevation", "radius")


def check_poses(c2w: Tensor, names: Sequence[str] | None = None) -> None:
    """Poses (N, 4, 4) must be rotations and translations.

    Raises:
        InputError: wrong shape, not finite, mirrored, scaled or sheared axes, or a last row that is not (0, 0, 0, 1); it names the pose.
    """
    if c2w.ndim != 3 or c2w.shape[-2:] != (4, 4) or not len(c2w):
        raise InputError(f"poses are camera-to-world matrices (N, 4, 4) with N >= 1, not {tuple(c2w.shape)}")
    label = (lambda i: f"pose {i}") if names is None else (lambda i: f"the pose of {names[i]}")
    finite = c2w.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        raise InputError(f"{label(int((~finite).nonzero()[0]))} has entries that are not finite: export it again")
    matrices = c2w.double()
    last = (matrices[:, 3] - matrices.new_tensor([0.0, 0.0, 0.0, 1.0])).abs().amax(1)
    if bool((last > TOLERANCE).any()):
        raise InputError(
            f"{label(int(last.argmax()))} does not end with the row (0, 0, 0, 1): is it transposed, or no 4x4 pose?"
        )
    rotation = matrices[:, :3, :3]
    off = (rotation.mT @ rotation - torch.eye(3).to(matrices)).abs().flatten(1).amax(1)
    if bool((off > TOLERANCE).any()):
        worst = int(off.argmax())
        raise InputError(
            f"{label(worst)} is no rotation (R^T R differs from 1 by {float(off[worst]):.3g}): "
            "divide the scale out of its axes and make them perpendicular"
        )
    mirrored = torch.linalg.det(rotation) < 0
    if bool(mirrored.any()):
        raise InputError(f"{label(int(mirrored.nonzero()[0]))} is a mirror image (determinant -1): negate one axis")


@dataclass
class Cameras:
    """N cameras with one picture size.

    Attributes:
        c2w: (N, 4, 4) camera-to-world, OpenGL axes (+X right, +Y up, looking along -Z). fx, fy, cx, cy: (N,) in pixels (numbers are repeated).
        width, height: of the picture, in pixels. near, far: distances along a ray that are seen, in world units.
        distortion: (N, 5) k1, k2, k3, p1, p2 of OpenCV's lens, or None. times, ids: (N,) or None.
        azimuth, elevation: (N,) degrees, radius: (N,), where they are known.

    Raises:
        InputError: a pose that is no rotation, a focal length that is not above 0, near and far not 0 < near < far, other shapes.
    """

    c2w: Tensor
    fx: Tensor
    fy: Tensor
    cx: Tensor
    cy: Tensor
    width: int
    height: int
    near: float = 0.05
    far: float = 1000.0
    distortion: Tensor | None = None
    times: Tensor | None = None
    ids: Tensor | None = None
    azimuth: Tensor | None = None
    elevation: Tensor | None = None
    radius: Tensor | None = None

    def __post_init__(self) -> None:
        check_poses(self.c2w)
        n = len(self.c2w)
        for name in PER_CAMERA[1:5]:
            value = torch.as_tensor(getattr(self, name), dtype=self.c2w.dtype, device=self.c2w.device)
            value = value.expand(n) if value.ndim == 0 else value
            setattr(self, name, value)
        for name in PER_CAMERA[1:]:
            value = getattr(self, name)
            expected = (n, 5) if name == "distortion" else (n,)
            if value is not None and value.shape != expected:
                raise InputError(f"{name} of {n} cameras is {expected}, not {tuple(value.shape)}")
        if self.width < 1 or self.height < 1:
            raise InputError(f"a picture has 1 pixel or more on each side (got {self.width} x {self.height})")
        if not bool(((self.fx > 0) & (self.fy > 0) & self.fx.isfinite() & self.fy.isfinite()).all()):
            raise InputError("focal lengths are finite and above 0, in pixels")
        if not 0 < self.near < self.far:
            raise InputError(f"a camera needs 0 < near < far (got near {self.near}, far {self.far})")

    def __len__(self) -> int:
        return len(self.c2w)

    def __getitem__(self, which: int | slice | Tensor | Sequence[int]) -> Cameras:
        """Some of the cameras; a number gives one camera, still with its first axis."""
        if isinstance(which, int):
            which = [which]
        return self._each(lambda value: value[which])

    def to(self, *args: Any, **options: Any) -> Cameras:
        """The same cameras on another device; a dtype changes floating-point tensors only, as with ``nn.Module.to``."""
        probe = self.c2w.to(*args, **options)
        return self._each(lambda v: v.to(probe.device, probe.dtype) if v.is_floating_point() else v.to(probe.device))

    def _each(self, change: Any) -> Cameras:
        return replace(self, **{k: change(v) for k in PER_CAMERA if (v := getattr(self, k)) is not None})

    @property
    def positions(self) -> Tensor:
        """(N, 3) in world units."""
        return self.c2w[:, :3, 3]

    @property
    def intrinsics(self) -> Tensor:
        """(N, 3, 3) matrices K = [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]."""
        zero, one = torch.zeros_like(self.fx), torch.ones_like(self.fx)
        rows = [self.fx, zero, self.cx, zero, self.fy, self.cy, zero, zero, one]
        return torch.stack(rows, -1).view(-1, 3, 3)

    @property
    def viewmats(self) -> Tensor:
        """(N, 4, 4) world-to-camera in OpenCV's axes (+Y down, +Z forward), what COLMAP and gsplat call the extrinsics."""
        return to_opencv(self.c2w)

    def rays(self, ids: Tensor | int, pixels: Tensor | None = None) -> Rays:
        """Rays through pixels.

        Args:
            ids: (R,) which camera each pixel belongs to, or one number for all.
            pixels: (R, 2) as (column, row); fractions are allowed. None: every pixel of camera ``ids``, row by row.

        Returns:
            origins (R, 3) and unit directions (R, 3).
        """
        if pixels is None:
            pixels = pixel_grid(self.width, self.height, self.c2w.device)
        which = torch.as_tensor(ids, device=self.c2w.device).expand(len(pixels))
        if bool(((which < -len(self)) | (which >= len(self))).any()):
            raise InputError(f"a camera's number is below {len(self)} (got {int(which.max())})")
        lens = None if self.distortion is None else self.distortion[which]
        local = camera_directions(pixels, self.fx[which], self.fy[which], self.cx[which], self.cy[which], lens)
        pose = self.c2w[which]
        directions = F.normalize((pose[:, :3, :3] @ local[..., None])[..., 0], dim=-1)
        return Rays(pose[:, :3, 3], directions)

    def project(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Where world points (M, 3) land: continuous picture coordinates (N, M, 2) (pixel (i, j) covers [i, i+1) x [j, j+1)) and depth
        (N, M) along the optical axis; points with depth <= 0 are behind the camera and their coordinates mean nothing."""
        viewmats = self.viewmats
        local = points @ viewmats[:, :3, :3].mT + viewmats[:, None, :3, 3]
        depth = local[..., 2]
        ideal = local[..., :2] / torch.where(depth.abs() < 1e-9, torch.full_like(depth, 1e-9), depth)[..., None]
        if self.distortion is not None:
            ideal = distort(ideal, self.distortion[:, None].expand(*ideal.shape[:-1], 5))
        scale, shift = torch.stack([self.fx, self.fy], -1), torch.stack([self.cx, self.cy], -1)
        return ideal * scale[:, None] + shift[:, None], depth

    def resized(self, width: int, height: int) -> Cameras:
        """The same views at another picture size."""
        x, y = width / self.width, height / self.height
        return replace(self, fx=self.fx * x, cx=self.cx * x, fy=self.fy * y, cy=self.cy * y, width=width, height=height)

    def check_sees(self, aabb: Tensor) -> None:
        """Every camera must reach something of a box beyond its near plane.

        Raises:
            InputError: the box lies wholly inside a camera's near plane, or wholly beyond its far one; it names the camera.
        """
        box = aabb.to(self.c2w)
        corner = torch.maximum((self.positions - box[0]).abs(), (self.positions - box[1]).abs()).norm(dim=-1)
        if bool((corner <= self.near).any()):
            raise InputError(
                f"camera {int(corner.argmin())} is inside the near plane: all of the box is within {float(corner.min()):.3g} of it "
                f"and near is {self.near}; lower near or move the camera away"
            )
        gap = (self.positions - self.positions.clamp(box[0], box[1])).norm(dim=-1)
        if bool((gap >= self.far).any()):
            raise InputError(
                f"camera {int(gap.argmax())} is {float(gap.max()):.3g} away from the box and far is {self.far}; raise far"
            )


def focal_from_fov(degrees: Tensor | float, pixels: int) -> Tensor:
    """Focal length in pixels of a field of view over a side of ``pixels``: 0.5 pixels / tan(angle / 2)."""
    angle = torch.deg2rad(torch.as_tensor(degrees, dtype=torch.get_default_dtype()))
    if not bool(((angle > 0) & (angle < math.pi)).all()):
        raise InputError("a field of view is between 0 and 180 degrees")
    return 0.5 * pixels / torch.tan(angle / 2)


def look_at(positions: Tensor, centre: Tensor, up: Tensor | None = None) -> Tensor:
    """Poses (N, 4, 4) at ``positions`` (N, 3) looking at ``centre`` (3,) or (N, 3); ``up`` is +Z unless given.

    Raises:
        InputError: a camera at its own centre, or looking along ``up``.
    """
    target = centre.to(positions).expand_as(positions)
    above = positions.new_tensor([0.0, 0.0, 1.0]) if up is None else up.to(positions)
    offset = target - positions
    if bool((offset.norm(dim=-1) < 1e-8).any()):
        raise InputError("a camera stands at the point that it should look at: raise its radius")
    forward = F.normalize(offset, dim=-1)
    right = torch.linalg.cross(forward, above.expand_as(forward))
    if bool((right.norm(dim=-1) < 1e-6).any()):
        raise InputError(
            "a camera looks along 'up', which leaves its roll open: keep elevations inside (-90, 90) degrees"
        )
    right = F.normalize(right, dim=-1)
    pose = torch.eye(4).to(positions).repeat(len(positions), 1, 1)
    pose[:, :3] = torch.stack([right, torch.linalg.cross(right, forward), -forward, positions], -1)
    return pose


def orbit_positions(azimuth: Tensor, elevation: Tensor, radius: Tensor) -> Tensor:
    """r (cos e cos a, cos e sin a, sin e), (N, 3), angles in degrees: azimuth 0 is +X and grows towards +Y."""
    a, e = torch.deg2rad(azimuth), torch.deg2rad(elevation)
    return radius[:, None] * torch.stack([e.cos() * a.cos(), e.cos() * a.sin(), e.sin()], -1)


def orbit(
    azimuth: Tensor | Sequence[float],
    elevation: Tensor | Sequence[float] | float = 15.0,
    radius: Tensor | Sequence[float] | float = 2.5,
    fovy: Tensor | float = 45.0,
    width: int = 64,
    height: int = 64,
    near: float = 0.05,
    far: float = 1000.0,
) -> Cameras:
    """Cameras around the origin, square pixels. Angles in degrees; numbers are repeated.

    Raises:
        InputError: a radius within the near plane.
    """
    a = torch.as_tensor(azimuth, dtype=torch.get_default_dtype()).reshape(-1)
    e = torch.as_tensor(elevation, dtype=a.dtype).expand_as(a)
    r = torch.as_tensor(radius, dtype=a.dtype).expand_as(a)
    if bool((r <= near).any()):
        raise InputError(
            f"a camera at radius {float(r.min()):.3g} is inside the near plane ({near}): lower near or raise the radius"
        )
    c2w = look_at(orbit_positions(a, e, r), torch.zeros(3))
    focal = focal_from_fov(fovy, height).to(a).expand_as(a)
    return Cameras(
        c2w, focal, focal, torch.tensor(width / 2), torch.tensor(height / 2), width, height, near, far,
        azimuth=a, elevation=e, radius=r,
    )  # fmt: skip


@dataclass(frozen=True)
class RandomOrbit:
    r"""Cameras for score distillation, drawn anew at every step.

    Azimuths are stratified over the batch. Each elevation is, with equal chances, uniform in the angle or uniform in its sine (uniform on
    the sphere). With ``open_steps`` n > 0 the ranges open from the evaluation pose: at step s, lerp(pose, range, min(1, s / (n + 1))).
    The azimuth, elevation and radius kept on the cameras are those before the jitters, as prompts per view need them.

    Attributes:
        azimuth, elevation, fovy: ranges in degrees. radius: range in world units.
        jitter_position: half width of a uniform shift. jitter_centre, jitter_up: standard deviations. All three 0 for VSD.
        open_steps: 0 for full ranges at once. evaluation: azimuth, elevation, fovy (degrees) and radius where the ranges open from.

    Defaults are threestudio's DreamFusion configuration.
    """

    width: int = 64
    height: int = 64
    azimuth: tuple[float, float] = (-180.0, 180.0)
    elevation: tuple[float, float] = (-10.0, 45.0)
    radius: tuple[float, float] = (1.0, 1.5)
    fovy: tuple[float, float] = (40.0, 70.0)
    jitter_position: float = 0.1
    jitter_centre: float = 0.2
    jitter_up: float = 0.02
    open_steps: int = 0
    evaluation: tuple[float, float, float, float] = (0.0, 15.0, 70.0, 1.5)
    near: float = 0.05
    far: float = 1000.0

    def __post_init__(self) -> None:
        for name in ("azimuth", "elevation", "radius", "fovy"):
            low, high = getattr(self, name)
            if not low <= high:
                raise InputError(f"{name} is a range (low, high) with low <= high (got {low}, {high})")
        if not (self.elevation[0] > -90 and self.elevation[1] < 90):
            raise InputError(f"elevations are inside (-90, 90) degrees (got {self.elevation})")
        if self.radius[0] - self.jitter_position * math.sqrt(3) <= self.near:
            raise InputError(
                f"radius {self.radius[0]} less the jitter reaches inside the near plane ({self.near}): raise radius or lower near"
            )

    def sample(self, batch: int, generator: torch.Generator | None = None, step: int | None = None) -> Cameras:
        """``batch`` cameras; ``step`` matters with ``open_steps`` only (None: full ranges)."""
        opened = 1.0 if not self.open_steps or step is None else min(1.0, step / (self.open_steps + 1))
        poses = dict(zip(("azimuth", "elevation", "fovy", "radius"), self.evaluation, strict=True))
        span = {k: [p + (v - p) * opened for v in getattr(self, k)] for k, p in poses.items()}

        def uniform(low: float, high: float, *more: int) -> Tensor:
            return low + (high - low) * torch.rand((batch, *more), generator=generator)

        low, high = span["azimuth"]
        azimuth = low + (high - low) * (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        low, high = span["elevation"]
        sines = uniform(math.sin(math.radians(low)), math.sin(math.radians(high)))
        by_angle = torch.rand(batch, generator=generator) < 0.5
        elevation = torch.where(by_angle, uniform(low, high), torch.rad2deg(torch.asin(sines)))
        radius, fovy = uniform(*span["radius"]), uniform(*span["fovy"])
        position = orbit_positions(azimuth, elevation, radius)
        position = position + self.jitter_position * uniform(-1.0, 1.0, 3)
        centre = self.jitter_centre * torch.randn((batch, 3), generator=generator)
        up = torch.tensor([0.0, 0.0, 1.0]) + self.jitter_up * torch.randn((batch, 3), generator=generator)
        focal = focal_from_fov(fovy, self.height)
        return Cameras(
            look_at(position, centre, up), focal, focal, torch.tensor(self.width / 2), torch.tensor(self.height / 2),
            self.width, self.height, self.near, self.far, azimuth=azimuth, elevation=elevation, radius=radius,
        )  # fmt: skip


def to_opencv(c2w: Tensor) -> Tensor:
    """World-to-camera matrices (..., 4, 4) with OpenCV's axes, from our poses: the rigid inverse of c2w diag(1, -1, -1, 1)."""
    rotation = (c2w[..., :3, :3] * c2w.new_tensor([1.0, -1.0, -1.0])).mT
    view = torch.zeros_like(c2w)
    view[..., :3, :3] = rotation
    view[..., :3, 3] = -(rotation @ c2w[..., :3, 3:])[..., 0]
    view[..., 3, 3] = 1
    return view


def from_opencv(viewmats: Tensor) -> Tensor:
    """Our poses from world-to-camera matrices (..., 4, 4) with OpenCV's axes."""
    rotation = viewmats[..., :3, :3].mT
    pose = torch.zeros_like(viewmats)
    pose[..., :3, :3] = rotation * viewmats.new_tensor([1.0, -1.0, -1.0])
    pose[..., :3, 3] = -(rotation @ viewmats[..., :3, 3:])[..., 0]
    pose[..., 3, 3] = 1
    return pose


def rotation_from_quaternion(quaternions: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of quaternions (..., 4) as (w, x, y, z), normalised here."""
    w, x, y, z = F.normalize(quaternions, dim=-1).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def from_colmap(qvec: Tensor, tvec: Tensor) -> Tensor:
    """Our poses from COLMAP's world-to-camera quaternion (..., 4) as (w, x, y, z) and translation (..., 3)."""
    view = torch.zeros((*qvec.shape[:-1], 4, 4), dtype=qvec.dtype, device=qvec.device)
    view[..., :3, :3], view[..., :3, 3], view[..., 3, 3] = rotation_from_quaternion(qvec), tvec, 1
    return from_opencv(view)


def to_ngp(c2w: Tensor, scale: float = 0.33, offset: float = 0.0) -> Tensor:
    """instant-ngp's poses from ours: world axes cycled (rows 1, 2, 0), camera's y and z negated, translation scaled, then shifted."""
    pose = c2w[..., [1, 2, 0, 3], :] * c2w.new_tensor([1.0, -1.0, -1.0, 1.0])
    pose[..., :3, 3] = pose[..., :3, 3] * scale + offset
    return pose


def from_ngp(pose: Tensor, scale: float = 0.33, offset: float = 0.0) -> Tensor:
    """The inverse of :func:`to_ngp`."""
    c2w = pose.clone()
    c2w[..., :3, 3] = (c2w[..., :3, 3] - offset) / scale
    return c2w[..., [2, 0, 1, 3], :] * pose.new_tensor([1.0, -1.0, -1.0, 1.0])


def normalised(cameras: Cameras, distance: float = 1.0) -> tuple[Cameras, Tensor]:
    """Cameras recentred on the point they look at (least squares over optical axes) and scaled to ``distance``.

    Returns:
        cameras whose farthest position is ``distance`` from the origin (near and far scaled too), and the similarity (4, 4) that
        takes old world coordinates to new ones; its inverse takes results back.

    Raises:
        InputError: parallel optical axes or cameras all in one place, which determine no centre or scale.
    """
    origins, forward = cameras.positions.double(), -cameras.c2w[:, :3, 2].double()
    away = torch.eye(3).to(origins) - forward[:, :, None] * forward[:, None, :]
    system = away.sum(0)
    if float(torch.linalg.eigvalsh(system)[0]) < 1e-6 * len(cameras):
        raise InputError(
            "the cameras' axes are parallel: they look at no common point, so give the scene's box yourself"
        )
    centre = torch.linalg.solve(system, (away @ origins[..., None]).sum(0))[:, 0]
    reach = float((origins - centre).norm(dim=-1).max())
    if reach < 1e-9:
        raise InputError("all cameras stand at the point they look at: the scene has no scale")
    scale = distance / reach
    transform = torch.eye(4).to(origins)
    transform[:3] = torch.cat([scale * torch.eye(3).to(origins), -scale * centre[:, None]], 1)
    c2w = cameras.c2w.clone()
    c2w[:, :3, 3] = ((origins - centre) * scale).to(c2w)
    radius = None if cameras.radius is None else cameras.radius * scale
    moved = replace(cameras, c2w=c2w, near=cameras.near * scale, far=cameras.far * scale, radius=radius)
    return moved, transform.to(c2w)
