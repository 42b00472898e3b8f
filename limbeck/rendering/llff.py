r"""LLFF's ``poses_bounds.npy``: forward-facing captures of a hand-held camera."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.rendering.cameras import Cameras, check_poses
from limbeck.rendering.pictures import PICTURE_SUFFIXES, Colour, fitted, read_pictures, reduced
from limbeck.rendering.posed_npz import load_arrays
from limbeck.rendering.transforms_io import Views


@dataclass
class BoundedViews(Views):
    """Posed pictures whose scene lies between known depths.

    Attributes:
        bounds: (N, 2) nearest and farthest depth that each picture sees, world units.
    """

    bounds: Tensor = field(default_factory=lambda: torch.zeros(0, 2))


def read_llff(
    path: str | Path,
    *,
    images: str | Path | None = None,
    background: Colour = (1.0, 1.0, 1.0),
    reduce: int = 1,
    near: float | None = None,
    far: float | None = None,
) -> BoundedViews:
    r"""Read ``poses_bounds.npy``: for each picture 17 numbers, a 3 x 5 matrix [R | t | (height, width, focal)] and two depths.

    The columns of LLFF's R are [down, right, backwards]; ours are [right, up, backwards].

    Args:
        path: the file, or its folder. images: the folder of the pictures, in the order of their names, or None for the cameras alone;
            pictures smaller than the file says shrink the intrinsics. background: behind pictures with alpha.
        reduce: shrink pictures by this whole factor.
        near, far: of the cameras; None takes 0.9 times the least and 1.1 times the greatest of the file's depths.

    Raises:
        InputError: no such file or another kind of file, mixed sizes, depths that are not 0 < near < far, a pose that is no rotation,
            another number of pictures.
    """
    file = Path(path)
    file = file / "poses_bounds.npy" if file.is_dir() else file
    table = load_arrays(file)
    if not isinstance(table, np.ndarray) or table.ndim != 2 or table.shape[1] != 17 or not len(table):
        shape = table.shape if isinstance(table, np.ndarray) else "several arrays"
        raise InputError(
            f"{file} must hold (N, 17) numbers, a 3 x 5 matrix and two depths for each picture (got {shape})"
        )
    rows = torch.from_numpy(table.astype(np.float64))
    if not bool(rows.isfinite().all()):
        raise InputError(f"{file} holds NaN or infinity: make it again with LLFF's imgs2poses")
    matrices, bounds = rows[:, :15].view(-1, 3, 5), rows[:, 15:]
    c2w = torch.eye(4, dtype=torch.float64).repeat(len(rows), 1, 1)
    down, right, back = matrices[:, :, :3].unbind(-1)
    c2w[:, :3, :3], c2w[:, :3, 3] = torch.stack([right, -down, back], -1), matrices[:, :, 3]
    paths = [] if images is None else _pictures_in(Path(images), len(rows), file)
    check_poses(c2w, [p.name for p in paths] or None)
    height, width, focal = matrices[:, :, 4].unbind(-1)
    if not bool((height == height[0]).all() and (width == width[0]).all()):
        raise InputError(f"{file} mixes picture sizes: split it or resize the pictures to one size")
    if not bool((bounds[:, 0] > 0).all() and (bounds[:, 0] < bounds[:, 1]).all()):
        raise InputError(f"{file} holds depths that are not 0 < near < far: make it again with LLFF's imgs2poses")
    cameras = Cameras(
        c2w.float(),
        focal.float(),
        focal.float(),
        width.float() / 2,
        height.float() / 2,
        int(width[0]),
        int(height[0]),
        0.9 * float(bounds.min()) if near is None else near,
        1.1 * float(bounds.max()) if far is None else far,
    )
    pictures = alpha = None
    if images is not None:
        pictures, alpha = read_pictures(paths, background)
        cameras = fitted(cameras, pictures, file)
    cameras, pictures, alpha = reduced(cameras, pictures, alpha, reduce)
    return BoundedViews(cameras, pictures, alpha, paths, bounds=bounds.float())


def _pictures_in(folder: Path, count: int, file: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist: name the folder of the pictures of {file}")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES)
    if len(found) != count:
        raise InputError(f"{file} has {count} poses but {folder} holds {len(found)} pictures: restore or remove some")
    return found
