"""Posed pictures in whatever form they come: the format is found out from the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from limbeck.core.errors import InputError
from limbeck.rendering.colmap import PLACES, read_colmap
from limbeck.rendering.llff import read_llff
from limbeck.rendering.pictures import Colour
from limbeck.rendering.posed_npz import read_posed_npz
from limbeck.rendering.transforms_io import Views, read_transforms

FOLDERS = ("images", "images_2", "images_4", "images_8", "input")  # the first there is


def read_capture(
    path: str | Path, *, images: bool = True, background: Colour = (1.0, 1.0, 1.0), reduce: int = 1
) -> Views:
    """Read posed pictures of any format that is known here.

    ==============================================  ==================================================
    a ``.json``, or a folder with transforms.json   NeRF's transforms (nerfstudio, instant-ngp)
    a folder with cameras.bin or cameras.txt, or    COLMAP; pictures from its ``images``, ``images_2``,
    with them in ``sparse/0``                       ``images_4``, ``images_8`` or ``input``
    a folder with poses_bounds.npy, or such a file  LLFF; pictures likewise
    a ``.npz``                                      ``images``, ``poses`` and ``focal``
    ==============================================  ==================================================

    Args:
        path: file or folder; of several formats in a folder the first one above counts.
        images: False for the cameras alone, where the format can do without. background: behind pictures with alpha.
        reduce: shrink pictures by this whole factor, and the intrinsics alike.

    Raises:
        InputError: nothing of the kind there; what the format's reader says. RunError: JSON that is damaged.
    """
    place = Path(path)
    if not place.exists():
        raise InputError(f"{place} does not exist: is the path the right one?")
    if place.suffix == ".json" or (place / "transforms.json").is_file():
        return read_transforms(place, images=images, background=background, reduce=reduce)
    if place.suffix == ".npz":
        return read_posed_npz(place, background=background, reduce=reduce)
    reader: Callable[..., Views] | None = None
    if any((place / part / f"cameras{end}").is_file() for part in PLACES for end in (".bin", ".txt")):
        reader = read_colmap
    elif place.name == "poses_bounds.npy" or (place / "poses_bounds.npy").is_file():
        reader = read_llff
    if reader is None:
        raise InputError(
            f"{place} holds no posed pictures: expected transforms.json, a COLMAP model, poses_bounds.npy or a .npz"
        )
    folder = _pictures_of(place if place.is_dir() else place.parent) if images else None
    return reader(place, images=folder, background=background, reduce=reduce)


def _pictures_of(folder: Path) -> Path:
    parents = (folder, *list(folder.resolve().parents)[:2])  # a model may be named by its own folder, sparse/0
    found = [parent / name for parent in parents for name in FOLDERS if (parent / name).is_dir()]
    if not found:
        raise InputError(f"{folder} has no folder of pictures beside the poses: expected {', '.join(FOLDERS)}")
    return found[0]
