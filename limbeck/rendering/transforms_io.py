"""Reading and writing NeRF's ``transforms.json``: poses, intrinsics, lenses and pictures (nerfstudio, instant-ngp, NeRF-synthetic)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.core.files import read_json, write_json
from limbeck.rendering.cameras import Cameras, check_poses, focal_from_fov
from limbeck.rendering.pictures import picture_size, read_pictures, reduced

LENS = ("k1", "k2", "k3", "p1", "p2")
SUFFIXES = ("", ".png", ".jpg", ".jpeg")  # NeRF-synthetic leaves the suffix out
PINHOLES = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "PERSPECTIVE")


@dataclass
class Views:
    """Posed pictures.

    Attributes:
        cameras: N of them, in the file's order. images: (N, H, W, 3) in [0, 1], sRGB, or None. alpha: (N, H, W), where files have it.
        paths: the pictures' files. aabb_scale: half the side of the scene's box, if the file says. applied_transform: (3, 4) or None.
    """

    cameras: Cameras
    images: Tensor | None = None
    alpha: Tensor | None = None
    paths: list[Path] = field(default_factory=list)
    aabb_scale: float | None = None
    applied_transform: Tensor | None = None


def read_transforms(
    path: str | Path,
    *,
    images: bool = True,
    background: tuple[float, float, float] = (1.0, 1.0, 1.0),
    reduce: int = 1,
    near: float = 0.05,
    far: float = 1000.0,
) -> Views:
    """Read a transforms file and its pictures.

    Intrinsics stand in the file or in each frame (a frame's own win); ``camera_angle_x`` serves where there is no ``fl_x``.

    Args:
        path: the file, or a folder with ``transforms.json``. images: False for the cameras alone (sizes must then be in the file, or one
            picture is opened for them). background: behind pictures with alpha (straight). reduce: shrink pictures by this whole
            factor (means of blocks) and scale intrinsics alike. near, far: of the cameras.

    Raises:
        InputError: missing pictures, a pose that is no rotation, no focal length, a fisheye lens, mixed sizes, missing entries.
        RunError: no such file, or not JSON.
    """
    file = Path(path)
    file = file / "transforms.json" if file.is_dir() else file
    data = read_json(file)
    frames = data.get("frames") if isinstance(data, dict) else None
    if not isinstance(frames, list) or not frames:
        raise InputError(f"{file} has no 'frames': is it a NeRF transforms file?")
    names = [_name(file, i, frame) for i, frame in enumerate(frames)]
    c2w = _poses(file, frames, names)
    merged = [{**{k: v for k, v in data.items() if k != "frames"}, **frame} for frame in frames]
    model = {str(m.get("camera_model", "OPENCV")) for m in merged}
    if model - set(PINHOLES):
        raise InputError(f"{file}: camera model {sorted(model)[0]} is not supported; undistort to a pinhole first")
    sized = all("w" in m and "h" in m for m in merged)
    paths = _files(file, names) if images or not sized else [file.parent / n for n in names]
    pictures = alpha = None
    if images:
        pictures, alpha = read_pictures(paths, background)
    sizes = [(int(m["w"]), int(m["h"])) for m in merged] if sized else [picture_size(p) for p in paths]
    if len(set(sizes)) > 1:
        raise InputError(
            f"{file} mixes picture sizes ({sizes[0]} and others): split it or resize the pictures to one size"
        )
    width, height = sizes[0]
    if pictures is not None and pictures.shape[1:3] != (height, width):
        raise InputError(
            f"{file} says {width} x {height} but its pictures are {pictures.shape[2]} x {pictures.shape[1]}: correct w and h"
        )
    focal = torch.tensor([_focal(file, m, width, height) for m in merged])
    centre = torch.tensor([[float(m.get("cx", width / 2)), float(m.get("cy", height / 2))] for m in merged])
    lens = torch.tensor([[float(m.get(k, 0.0)) for k in LENS] for m in merged])
    cameras = Cameras(
        c2w, focal[:, 0], focal[:, 1], centre[:, 0], centre[:, 1], width, height, near, far,
        distortion=lens if bool(lens.any()) else None,
    )  # fmt: skip
    cameras, pictures, alpha = reduced(cameras, pictures, alpha, reduce)
    applied = data.get("applied_transform")
    return Views(
        cameras, pictures, alpha, paths, data.get("aabb_scale"), None if applied is None else torch.tensor(applied)
    )


def write_transforms(
    path: str | Path, cameras: Cameras, images: Tensor | None = None, names: list[str] | None = None
) -> Path:
    """Write cameras, and pictures (N, H, W, 3) as PNG beside them; intrinsics that all cameras share stand once.

    Args:
        path: the file, or a folder for ``transforms.json``. names: of the pictures relative to it; default ``images/0000.png`` and so on.

    Returns:
        the file.
    """
    from PIL import Image

    file = Path(path)
    file = file if file.suffix == ".json" else file / "transforms.json"
    names = names or [f"images/{i:04d}.png" for i in range(len(cameras))]
    if len(names) != len(cameras):
        raise InputError(f"{len(cameras)} cameras need as many names (got {len(names)})")
    columns = {"fl_x": cameras.fx, "fl_y": cameras.fy, "cx": cameras.cx, "cy": cameras.cy}
    if cameras.distortion is not None:
        columns.update(zip(LENS, cameras.distortion.unbind(-1), strict=True))
    shared = {k: v[0].item() for k, v in columns.items() if bool((v == v[0]).all())}
    frames = [
        {
            "file_path": name,
            "transform_matrix": cameras.c2w[i].tolist(),
            **{k: v[i].item() for k, v in columns.items() if k not in shared},
        }
        for i, name in enumerate(names)
    ]
    if images is not None:
        if images.shape != (len(cameras), cameras.height, cameras.width, 3):
            raise InputError(
                f"pictures are {(len(cameras), cameras.height, cameras.width, 3)}, not {tuple(images.shape)}"
            )
        bytes_ = (images.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        for name, picture in zip(names, bytes_, strict=True):
            target = file.parent / name
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(target)
    header = {"camera_model": "OPENCV", "w": cameras.width, "h": cameras.height}
    write_json(file, {**header, **shared, "frames": frames})
    return file


def _name(file: Path, i: int, frame: Any) -> str:
    if not isinstance(frame, dict) or "file_path" not in frame or "transform_matrix" not in frame:
        raise InputError(f"{file}: frame {i} needs 'file_path' and 'transform_matrix'")
    return str(frame["file_path"])


def _poses(file: Path, frames: list[dict[str, Any]], names: list[str]) -> Tensor:
    rows = []
    for frame, name in zip(frames, names, strict=True):
        try:
            pose = np.asarray(frame["transform_matrix"], dtype=np.float64)
        except (TypeError, ValueError):
            pose = np.zeros(0)
        if pose.shape != (4, 4):
            raise InputError(f"{file}: the transform_matrix of {name} is not 4 x 4 numbers")
        rows.append(pose)
    c2w = torch.from_numpy(np.stack(rows))
    check_poses(c2w, names)
    return c2w.float()


def _focal(file: Path, merged: dict[str, Any], width: int, height: int) -> tuple[float, float]:
    def one(length: str, angle: str, side: int) -> float | None:
        if length in merged:
            return float(merged[length])
        return float(focal_from_fov(math.degrees(float(merged[angle])), side)) if angle in merged else None

    x, y = one("fl_x", "camera_angle_x", width), one("fl_y", "camera_angle_y", height)
    if x is None and y is None:
        raise InputError(f"{file} gives no focal length for {merged['file_path']}: add fl_x or camera_angle_x")
    return (x if x is not None else y), (y if y is not None else x)  # type: ignore[return-value]  # one is a number


def _files(file: Path, names: list[str]) -> list[Path]:
    found, missing = [], []
    for name in names:
        options = [file.parent / (name + suffix) for suffix in SUFFIXES]
        hit = next((p for p in options if p.is_file()), None)
        if hit is None:
            missing.append(name)
        else:
            found.append(hit)
    if missing:
        listed = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise InputError(
            f"{len(missing)} of {len(names)} pictures of {file} are missing ({listed}): restore them or remove their frames"
        )
    return found
