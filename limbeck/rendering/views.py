"""One pinhole camera as splatting sees it: OpenCV's axes, plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.core.errors import InputError


@dataclass(frozen=True)
class View:
    """One pinhole camera with OpenCV axes (+x right, +y down, +z forward), lengths in pixels.

    Attributes:
        viewmat: world-to-camera (4, 4). fx, fy, cx, cy: intrinsics. width, height: of the image. near, far: depths drawn.
    """

    viewmat: Tensor
    fx: float
    fy: float
    cx: float
    cy: float
    width: int
    height: int
    near: float = 0.01
    far: float = 1e10

    def __post_init__(self) -> None:
        if self.viewmat.shape != (4, 4):
            raise InputError(f"a view matrix is (4, 4), not {tuple(self.viewmat.shape)}")
        turn = self.viewmat[:3, :3].detach().double()
        if not bool(torch.isfinite(self.viewmat).all()):
            raise InputError("the view matrix contains NaN or infinity")
        if float((turn @ turn.T - torch.eye(3).to(turn)).abs().max()) > 1e-3 or float(torch.linalg.det(turn)) < 0:
            raise InputError("the view matrix is no rotation and translation: remove scale, shear or mirroring first")
        if min(self.width, self.height) < 1 or not min(self.fx, self.fy) > 0:
            raise InputError(
                f"an image has a size and focal lengths above 0 (got {self.width}x{self.height}, fx {self.fx}, fy {self.fy})"
            )
        if not 0 < self.near < self.far:
            raise InputError(f"near and far obey 0 < near < far (got {self.near} and {self.far})")

    @property
    def centre(self) -> Tensor:
        """The position of the camera (3,), world units."""
        return -self.viewmat[:3, :3].T @ self.viewmat[:3, 3]


def view_of(cameras: Any, index: int | None = None) -> View:
    """One camera of ``limbeck.rendering.cameras.Cameras`` (OpenGL axes) as a :class:`View`.

    Args:
        cameras: anything with c2w (N, 4, 4), fx, fy, cx, cy (N,), width, height, near, far. index: which; may be None if N = 1.

    Raises:
        InputError: several cameras and no index, no such index, a lens with distortion.
    """
    if isinstance(cameras, View):
        return cameras
    count = len(cameras.c2w)
    if index is None and count != 1:
        raise InputError(f"splatting draws one camera at a time and got {count}: say which with index=")
    which = 0 if index is None else index
    if not -count <= which < count:
        raise InputError(f"there is no camera {which} among {count}")
    distortion = getattr(cameras, "distortion", None)
    if distortion is not None and bool((torch.as_tensor(distortion) != 0).any()):
        raise InputError("splatting draws pinhole cameras only: undistort the images and drop the distortion first")

    def number(name: str) -> float:
        value = torch.as_tensor(getattr(cameras, name))
        return float(value.expand(count)[which] if value.ndim <= 1 else value.flatten()[which])

    c2w = cameras.c2w[which]
    flipped = c2w * c2w.new_tensor([1, -1, -1, 1])  # the columns up and back become down and forward
    turn = flipped[:3, :3].T
    viewmat = torch.eye(4).to(c2w)
    viewmat = torch.cat([torch.cat([turn, -(turn @ flipped[:3, 3:])], 1), viewmat[3:]], 0)
    lens = {name: number(name) for name in ("fx", "fy", "cx", "cy", "near", "far")}
    return View(viewmat=viewmat, width=int(cameras.width), height=int(cameras.height), **lens)
