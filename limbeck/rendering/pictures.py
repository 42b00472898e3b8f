"""Picture files as tensors: read, put on a background where they have alpha, and shrunk to what cameras say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.errors import InputError
from limbeck.rendering.cameras import Cameras

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
Colour = tuple[float, float, float]


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture file.

    Raises:
        InputError: no picture, or a damaged one.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return picture.size
    except (UnidentifiedImageError, OSError):
        raise InputError(f"{path} is not a readable picture: it was changed or damaged") from None


def read_pictures(paths: Sequence[Path], background: Colour = (1.0, 1.0, 1.0)) -> tuple[Tensor, Tensor | None]:
    """Pictures of one size: colours (N, H, W, 3) in [0, 1] over ``background``, and their alpha (N, H, W) if any has some.

    Raises:
        InputError: a file that is no picture, or of another size than the first.
    """
    from PIL import Image, UnidentifiedImageError

    arrays: list[np.ndarray] = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                arrays.append(np.asarray(picture.convert("RGBA")))
        except (UnidentifiedImageError, OSError):
            raise InputError(f"{path} is not a readable picture: it was changed or damaged") from None
    other = next((p for p, a in zip(paths, arrays, strict=True) if a.shape != arrays[0].shape), None)
    if other is not None:
        raise InputError(f"{other} has another size than {paths[0]}: resize the pictures to one size")
    values = torch.from_numpy(np.stack(arrays)).float() / 255
    rgb, alpha = values[..., :3], values[..., 3]
    if bool((alpha == 1).all()):
        return rgb.contiguous(), None
    return rgb * alpha[..., None] + (1 - alpha[..., None]) * torch.tensor(background), alpha


def shrunk(pictures: Tensor, factor: int) -> Tensor:
    """Pictures (N, H, W, C) with sides shorter by a whole factor: means of blocks."""
    return F.avg_pool2d(pictures.movedim(-1, 1), factor).movedim(1, -1)


def reduced(
    cameras: Cameras, pictures: Tensor | None, alpha: Tensor | None, factor: int
) -> tuple[Cameras, Tensor | None, Tensor | None]:
    """Cameras and their pictures with sides shorter by a whole factor.

    Raises:
        InputError: a factor below 1, or by which the sides are not divisible.
    """
    if factor < 1 or int(factor) != factor:
        raise InputError(f"reduce is a whole factor of 1 or more (got {factor})")
    if factor == 1:
        return cameras, pictures, alpha
    width, height = cameras.width, cameras.height
    if width % factor or height % factor:
        raise InputError(f"{width} x {height} is not divisible by reduce = {factor}")
    return (
        cameras.resized(width // factor, height // factor),
        None if pictures is None else shrunk(pictures, factor),
        None if alpha is None else shrunk(alpha[..., None], factor)[..., 0],
    )


def fitted(cameras: Cameras, pictures: Tensor, source: Path) -> Cameras:
    """Cameras at the size of pictures (N, H, W, 3) that were shrunk (or enlarged) after their calibration.

    Raises:
        InputError: the pictures' sides are in another proportion, by more than a pixel.
    """
    height, width = pictures.shape[1:3]
    if abs(cameras.width * height / cameras.height - width) > 1:
        raise InputError(
            f"{source} says {cameras.width} x {cameras.height} but its pictures are {width} x {height}: give the ones it was made from"
        )
    return cameras.resized(width, height)


def listed(names: Sequence[str], folder: Path, source: Path) -> list[Path]:
    """The files of pictures with given names in a folder.

    Raises:
        InputError: some are missing; it names the first ones.
    """
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        first = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise InputError(
            f"{len(missing)} of {len(names)} pictures of {source} are missing in {folder} ({first}): restore them or name their folder"
        )
    return [folder / name for name in names]
