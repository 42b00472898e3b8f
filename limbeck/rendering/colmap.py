r"""COLMAP's sparse models: cameras, poses and a cloud of points, from text or binary files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.errors import InputError
from limbeck.core.files import write_text
from limbeck.rendering.cameras import Cameras, check_poses, from_colmap
from limbeck.rendering.colmap_files import (
    Lens,
    Photo,
    read_cameras_binary,
    read_cameras_text,
    read_images_binary,
    read_images_text,
    read_points_binary,
    read_points_text,
)
from limbeck.rendering.pictures import Colour, fitted, listed, read_pictures, reduced
from limbeck.rendering.transforms_io import Views

PLACES = ("", "sparse/0", "sparse", "colmap/sparse/0")


@dataclass
class SparseModel(Views):
    """What COLMAP found out.

    Attributes:
        names: of the pictures, sorted; ``cameras`` are in their order.
        points: (P, 3) world points. colours: (P, 3) in [0, 1]. errors: (P,) mean reprojection errors in pixels.
    """

    names: list[str] = field(default_factory=list)
    points: Tensor = field(default_factory=lambda: torch.zeros(0, 3))
    colours: Tensor = field(default_factory=lambda: torch.zeros(0, 3))
    errors: Tensor = field(default_factory=lambda: torch.zeros(0))


def read_colmap(
    path: str | Path,
    *,
    images: str | Path | None = None,
    background: Colour = (1.0, 1.0, 1.0),
    reduce: int = 1,
    near: float = 0.05,
    far: float = 1000.0,
) -> SparseModel:
    """Read a sparse model, ``.bin`` where there is one and else ``.txt``.

    COLMAP's world has no fixed up direction or scale; :func:`~limbeck.rendering.cameras.normalised` recentres and rescales. Its camera
    models SIMPLE_PINHOLE, PINHOLE, SIMPLE_RADIAL, RADIAL and OPENCV are ours.

    Args:
        path: the folder with cameras, images and points3D, or a project's folder with ``sparse/0`` in it.
        images: the folder of the pictures, None for the cameras alone. Pictures that were shrunk since then shrink the intrinsics.
        background: behind pictures with alpha. reduce: shrink pictures by this whole factor. near, far: of the cameras, world units.

    Raises:
        InputError: no model there, another camera model, cameras of several sizes, files that are cut short or no COLMAP files, a pose
            that is no rotation, missing pictures.
    """
    folder, ending = _located(Path(path))
    binary = ending == ".bin"
    lenses = (read_cameras_binary if binary else read_cameras_text)(folder / f"cameras{ending}")
    photos = (read_images_binary if binary else read_images_text)(folder / f"images{ending}")
    photos.sort(key=lambda photo: photo.name)
    if not photos:
        raise InputError(f"{folder / f'images{ending}'} lists no pictures: did COLMAP register any?")
    cameras = _cameras(folder, lenses, photos, near, far)
    names = [photo.name for photo in photos]
    pictures = alpha = None
    paths: list[Path] = []
    if images is not None:
        paths = listed(names, Path(images), folder)
        pictures, alpha = read_pictures(paths, background)
        cameras = fitted(cameras, pictures, folder)
    cameras, pictures, alpha = reduced(cameras, pictures, alpha, reduce)
    cloud = folder / f"points3D{ending}"
    points, colours, errors = np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0)
    if cloud.is_file():
        points, colours, errors = (read_points_binary if binary else read_points_text)(cloud)
    return SparseModel(
        cameras, pictures, alpha, paths, names=names, points=torch.from_numpy(points).float(),
        colours=torch.from_numpy(colours).float() / 255, errors=torch.from_numpy(errors).float(),
    )  # fmt: skip


def write_colmap(
    folder: str | Path,
    cameras: Cameras,
    names: Sequence[str] | None = None,
    points: Tensor | None = None,
    colours: Tensor | None = None,
) -> Path:
    """Write a sparse model in COLMAP's text form: PINHOLE cameras, or OPENCV with a lens; equal intrinsics stand once.

    Args:
        folder: where ``cameras.txt``, ``images.txt`` and ``points3D.txt`` go. names: of the pictures; default ``0000.png`` and so on.
        points: (P, 3) world points, or None. colours: (P, 3) in [0, 1], grey if None.

    Returns:
        the folder.

    Raises:
        InputError: other numbers of names or colours; names with spaces; a lens with k3, which those models do not have. RunError: it cannot be written.
    """
    target = Path(folder)
    names = [f"{i:04d}.png" for i in range(len(cameras))] if names is None else list(names)
    if len(names) != len(cameras):
        raise InputError(f"{len(cameras)} cameras need as many names (got {len(names)})")
    if spaced := next((name for name in names if len(name.split()) != 1), None):
        raise InputError(f"COLMAP's text form takes no spaces in the name of a picture ('{spaced}'): rename it")
    columns = [cameras.fx, cameras.fy, cameras.cx, cameras.cy]
    if cameras.distortion is not None:
        if bool(cameras.distortion[:, 2].any()):
            raise InputError("COLMAP's OPENCV camera has no k3: undistort the pictures first")
        columns += [cameras.distortion[:, k] for k in (0, 1, 3, 4)]
    model = "PINHOLE" if cameras.distortion is None else "OPENCV"
    table = torch.stack(columns, -1).detach().cpu().double()
    kinds, of = torch.unique(table, dim=0, return_inverse=True)
    size = f"{cameras.width} {cameras.height}"
    lines = [f"{i + 1} {model} {size} {_words(row)}" for i, row in enumerate(kinds.tolist())]
    write_text(target / "cameras.txt", "\n".join(["# CAMERA_ID MODEL WIDTH HEIGHT PARAMS[]", *lines, ""]))

    view = cameras.viewmats.detach().cpu().double()
    poses = torch.cat([quaternions(view[:, :3, :3]), view[:, :3, 3]], 1).tolist()
    lines = ["# IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, then a line of POINTS2D"]
    for i, (pose, camera, name) in enumerate(zip(poses, of.tolist(), names, strict=True)):
        lines += [f"{i + 1} {_words(pose)} {camera + 1} {name}", ""]
    write_text(target / "images.txt", "\n".join([*lines, ""]))

    points = torch.zeros(0, 3) if points is None else points.detach().cpu()
    colours = torch.full_like(points, 0.5) if colours is None else colours.detach().cpu()
    if points.ndim != 2 or points.shape[1] != 3 or colours.shape != points.shape:
        raise InputError(f"points and colours are (P, 3), not {tuple(points.shape)} and {tuple(colours.shape)}")
    shades = (colours.clamp(0, 1) * 255).round().int().tolist()
    rows = zip(points.double().tolist(), shades, strict=True)
    lines = [f"{i + 1} {_words(place)} {' '.join(map(str, shade))} 0" for i, (place, shade) in enumerate(rows)]
    write_text(target / "points3D.txt", "\n".join(["# POINT3D_ID X Y Z R G B ERROR TRACK[]", *lines, ""]))
    return target


def quaternions(rotations: Tensor) -> Tensor:
    """Unit quaternions (..., 4) as (w, x, y, z), w >= 0, of rotation matrices (..., 3, 3).

    Each row of the symmetric matrix below is 4 q_k q; the one with the largest q_k is well conditioned.
    """
    a, b, c, d, e, f, g, h, i = rotations.flatten(-2).unbind(-1)
    rows = [
        [1 + a + e + i, h - f, c - g, d - b],
        [h - f, 1 + a - e - i, b + d, c + g],
        [c - g, b + d, 1 - a + e - i, f + h],
        [d - b, c + g, f + h, 1 - a - e + i],
    ]
    matrix = torch.stack([torch.stack(row, -1) for row in rows], -2)
    best = matrix.diagonal(dim1=-2, dim2=-1).argmax(-1)
    found = matrix.gather(-2, best[..., None, None].expand(*best.shape, 1, 4))[..., 0, :]
    return F.normalize(torch.where(found[..., :1] < 0, -found, found), dim=-1)


def _words(row: Sequence[float]) -> str:
    return " ".join(f"{value:.17g}" for value in row)


def _located(path: Path) -> tuple[Path, str]:
    if not path.exists():
        raise InputError(f"{path} does not exist: is the folder the right one?")
    for place in PLACES:
        for ending in (".bin", ".txt"):
            folder = path / place
            if (folder / f"cameras{ending}").is_file():
                if not (folder / f"images{ending}").is_file():
                    raise InputError(f"{folder} has cameras{ending} but no images{ending}: copy the whole model")
                return folder, ending
    raise InputError(f"{path} holds no COLMAP model: expected cameras.bin or cameras.txt there or in sparse/0")


def _cameras(folder: Path, lenses: dict[int, Lens], photos: list[Photo], near: float, far: float) -> Cameras:
    unknown = next((photo for photo in photos if photo.camera not in lenses), None)
    if unknown is not None:
        raise InputError(
            f"{folder}: {unknown.name} was taken by camera {unknown.camera}, which is not in the cameras file"
        )
    used = [lenses[photo.camera] for photo in photos]
    sizes = sorted({lens.size for lens in used})
    if len(sizes) > 1:
        shown = " and ".join(f"{w} x {h}" for w, h in sizes[:2])
        raise InputError(f"{folder} mixes picture sizes ({shown}): split it or resize the pictures to one size")
    names = [photo.name for photo in photos]
    turns = torch.tensor([photo.quaternion for photo in photos], dtype=torch.float64)
    off = (turns.norm(dim=-1) - 1).abs()
    if not bool((off < 0.01).all()):
        worst = names[int((~(off < 0.01)).nonzero()[0])]
        raise InputError(f"{folder}: the quaternion of {worst} has not length 1: the file was changed or damaged")
    shifts = torch.tensor([photo.translation for photo in photos], dtype=torch.float64)
    c2w = from_colmap(turns, shifts)
    check_poses(c2w, names)
    fx, fy, cx, cy = torch.tensor([lens.pinhole for lens in used], dtype=torch.float64).float().unbind(-1)
    curves = torch.tensor([lens.distortion for lens in used], dtype=torch.float64).float()
    lens = curves if bool(curves.any()) else None
    width, height = sizes[0]
    return Cameras(c2w.float(), fx, fy, cx, cy, width, height, near, far, distortion=lens)
