"""Posed pictures in one ``.npz``: ``images``, ``poses`` and ``focal``, as the small lego scene of NeRF's notebook comes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from limbeck.core.errors import InputError
from limbeck.core.files import atomic_path
from limbeck.rendering.cameras import Cameras, check_poses
from limbeck.rendering.pictures import Colour, reduced
from limbeck.rendering.transforms_io import Views


def read_posed_npz(
    path: str | Path,
    *,
    background: Colour = (1.0, 1.0, 1.0),
    reduce: int = 1,
    near: float = 0.05,
    far: float = 1000.0,
) -> Views:
    """Read pictures and poses from one file; nothing in it is unpickled.

    Args:
        path: a ``.npz`` with ``images`` (N, H, W, 3 or 4), floats in [0, 1] or bytes; ``poses`` (N, 4, 4) camera-to-world with OpenGL axes;
            ``focal`` in pixels, one number or (N,).
        background: behind pictures with alpha (straight). reduce: shrink pictures by this whole factor. near, far: of the cameras.

    Raises:
        InputError: no such file or another kind of file, an array missing or of another shape, colours outside [0, 1], a pose that is no
            rotation.
    """
    file = Path(path)
    arrays = load_arrays(file)
    if isinstance(arrays, np.ndarray):
        raise InputError(f"{file} holds one array; images, poses and focal are needed: save them with numpy.savez")
    missing = [name for name in ("images", "poses", "focal") if name not in arrays]
    if missing:
        raise InputError(f"{file} lacks {', '.join(missing)}: it holds {', '.join(sorted(arrays)) or 'nothing'}")
    images, poses, focal = arrays["images"], arrays["poses"], np.atleast_1d(arrays["focal"])
    if images.ndim != 4 or images.shape[-1] not in (3, 4) or not images.size:
        raise InputError(f"{file}: images are (N, H, W, 3) or (N, H, W, 4), not {images.shape}")
    if poses.shape != (len(images), 4, 4) or focal.shape not in ((1,), (len(images),)):
        n = len(images)
        raise InputError(
            f"{file}: {n} images need poses ({n}, 4, 4) and one focal length or {n}, not {poses.shape} and {focal.shape}"
        )
    if images.dtype == np.uint8:
        values = torch.from_numpy(images).float() / 255
    else:
        values = torch.from_numpy(images.astype(np.float32))
    if not bool(values.isfinite().all()) or float(values.min()) < -1e-4 or float(values.max()) > 1.0001:
        raise InputError(
            f"{file}: images hold bytes, or finite numbers in [0, 1] (got {images.dtype} up to {images.max()})"
        )
    c2w = torch.from_numpy(poses.astype(np.float64))
    check_poses(c2w)
    rgb, alpha = values[..., :3].contiguous(), None
    if values.shape[-1] == 4:
        alpha = values[..., 3].contiguous()
        rgb = rgb * alpha[..., None] + (1 - alpha[..., None]) * torch.tensor(background)
    height, width = values.shape[1:3]
    length = torch.from_numpy(focal.astype(np.float32)).expand(len(images))
    middle = torch.tensor(width / 2), torch.tensor(height / 2)
    cameras = Cameras(c2w.float(), length, length, *middle, width, height, near, far)
    return Views(*reduced(cameras, rgb, alpha, reduce))


def write_posed_npz(path: str | Path, views: Views) -> Path:
    """Write pictures, poses and focal lengths; the reverse of :func:`read_posed_npz`, colours as bytes.

    Raises:
        InputError: no pictures; cameras that one focal length and a centred pinhole do not describe. RunError: it cannot be written.
    """
    target, cameras = Path(path), views.cameras
    if views.images is None:
        raise InputError("there are no pictures to write: read them with their cameras")
    centred = bool((cameras.cx == cameras.width / 2).all() and (cameras.cy == cameras.height / 2).all())
    if cameras.distortion is not None or not centred or not bool((cameras.fx == cameras.fy).all()):
        raise InputError("this format knows centred pinholes with square pixels only: write transforms.json instead")
    images = (views.images.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    with atomic_path(target) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, images=images, poses=cameras.c2w.cpu().numpy(), focal=cameras.fx.cpu().numpy())
    return target


def load_arrays(file: Path) -> np.ndarray | Mapping[str, np.ndarray]:
    """The array of a ``.npy`` or the arrays of a ``.npz``, never unpickled.

    Raises:
        InputError: no such file, another kind of file, a damaged one, objects instead of numbers.
    """
    try:
        found = np.load(file, allow_pickle=False)
        arrays = found if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
    except FileNotFoundError:
        raise InputError(f"{file} does not exist: is the path the right one?") from None
    except (OSError, ValueError, EOFError, BadZipFile, KeyError) as error:
        told = "objects, which are not read" if "Object arrays" in str(error) else "no arrays of numpy, or damaged ones"
        raise InputError(f"{file} holds {told}: save plain numbers again") from None
    values = [arrays] if isinstance(arrays, np.ndarray) else list(arrays.values())
    if any(value.dtype.kind not in "biuf" for value in values):
        raise InputError(f"{file} holds something else than numbers: save plain numbers again")
    return arrays
