"""The files of a COLMAP model as plain records: three kinds of them, each as text and in binary."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from limbeck.core.errors import InputError

MODELS = {
    "SIMPLE_PINHOLE": ("f", "cx", "cy"),
    "PINHOLE": ("fx", "fy", "cx", "cy"),
    "SIMPLE_RADIAL": ("f", "cx", "cy", "k1"),
    "RADIAL": ("f", "cx", "cy", "k1", "k2"),
    "OPENCV": ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2"),
}
OTHERS = (
    *("OPENCV_FISHEYE", "FULL_OPENCV", "FOV", "SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE", "THIN_PRISM_FISHEYE"),
    "RAD_TAN_THIN_PRISM_FISHEYE",
)
NUMBERED = (*MODELS, *OTHERS)  # a model's place is its number in binary files
Cloud = tuple[np.ndarray, np.ndarray, np.ndarray]
POINT = np.dtype([("id", "<u8"), ("xyz", "<f8", 3), ("rgb", "u1", 3), ("error", "<f8"), ("track", "<u8")])


class Lens(NamedTuple):
    """Intrinsics: ``size`` (width, height), ``pinhole`` (fx, fy, cx, cy), ``distortion`` (k1, k2, k3, p1, p2)."""

    size: tuple[int, int]
    pinhole: tuple[float, float, float, float]
    distortion: tuple[float, float, float, float, float]


class Photo(NamedTuple):
    """A registered picture: its world-to-camera rotation (w, x, y, z) and translation, OpenCV's axes, and its camera's number."""

    name: str
    quaternion: tuple[float, ...]
    translation: tuple[float, ...]
    camera: int


def lens(path: Path, number: int, model: str, width: int, height: int, values: list[float]) -> Lens:
    """The intrinsics that a line of the cameras file means.

    Raises:
        InputError: a model that is not ours; another number of parameters; a size that is none.
    """
    if model not in MODELS:
        raise InputError(
            f"{path}: camera {number} has the model {model}, which is not read here: "
            f"undistort with 'colmap image_undistorter', or calibrate with {', '.join(MODELS)}"
        )
    names = MODELS[model]
    if len(values) != len(names) or width < 1 or height < 1:
        raise InputError(
            f"{path}: camera {number} ({model}) needs a size and {len(names)} parameters (got {width} x {height} and {len(values)})"
        )
    known = dict(zip(names, values, strict=True))
    f = known.get("f", 0.0)
    pinhole = (known.get("fx", f), known.get("fy", f), known["cx"], known["cy"])
    k1, k2, p1, p2 = (known.get(name, 0.0) for name in ("k1", "k2", "p1", "p2"))
    return Lens((width, height), pinhole, (k1, k2, 0.0, p1, p2))


# ---- text


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a text file of COLMAP: it was changed or damaged") from None
    return [line for line in text.splitlines() if not line.startswith("#")]


def _not_understood(path: Path, line: str) -> InputError:
    return InputError(f"{path}: the line '{line.strip()[:60]}' is not understood: it was changed, damaged or cut short")


def read_cameras_text(path: Path) -> dict[int, Lens]:
    """Cameras by number: ``CAMERA_ID MODEL WIDTH HEIGHT PARAMS[]``."""
    found = {}
    for line in _lines(path):
        if not line.strip():
            continue
        try:
            number, model, width, height, *values = line.split()
            numbers = (int(number), int(width), int(height))
            values_ = [float(v) for v in values]
        except ValueError:
            raise _not_understood(path, line) from None
        found[numbers[0]] = lens(path, numbers[0], model, numbers[1], numbers[2], values_)
    return found


def read_images_text(path: Path) -> list[Photo]:
    """Pictures: ``IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME``, each followed by a line of 2-D points, which may be empty."""
    found, lines, i = [], _lines(path), 0
    while i < len(lines):
        line = lines[i]
        if not line.strip():
            i += 1
            continue
        try:
            _, *pose, camera, name = line.split(maxsplit=9)
            numbers = tuple(float(v) for v in pose)
            if len(numbers) != 7:
                raise ValueError
            found.append(Photo(name.strip(), numbers[:4], numbers[4:], int(camera)))
        except ValueError:
            raise _not_understood(path, line) from None
        points = lines[i + 1] if i + 1 < len(lines) else ""
        if len(points.split()) % 3:
            raise InputError(
                f"{path}: after {name.strip()} comes no line of 2-D points in threes: keep that line, empty if need be"
            )
        i += 2
    return found


def read_points_text(path: Path) -> Cloud:
    """Positions (P, 3), colours (P, 3) in 0 .. 255 and errors (P,): ``POINT3D_ID X Y Z R G B ERROR TRACK[]``."""
    lines = [line for line in _lines(path) if line.strip()]
    if not lines:
        return np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0)
    try:
        table = np.loadtxt(lines, usecols=range(1, 8), ndmin=2)
    except (ValueError, IndexError) as error:
        raise InputError(
            f"{path} is no text file of COLMAP's points ({' '.join(str(error).split())[:80]}): it was changed or cut short"
        ) from None
    return _checked(path, table[:, :3], table[:, 3:6], table[:, 6])


# ---- binary


@dataclass
class _Bytes:
    """A file that is read from front to back."""

    path: Path
    data: bytes
    at: int = 0

    @classmethod
    def of(cls, path: Path) -> _Bytes:
        try:
            return cls(path, path.read_bytes())
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from None

    def cut(self) -> InputError:
        return InputError(f"{self.path} is cut short or no binary file of COLMAP: copy or export it again")

    def take(self, layout: str) -> tuple[Any, ...]:
        try:
            values = struct.unpack_from(f"<{layout}", self.data, self.at)
        except struct.error:
            raise self.cut() from None
        self.at += struct.calcsize(f"<{layout}")
        return values

    def skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self.data):
            raise self.cut()

    def text(self) -> str:
        end = self.data.find(b"\0", self.at)
        if end < 0:
            raise self.cut()
        try:
            found = self.data[self.at : end].decode("utf-8")
        except UnicodeDecodeError:
            raise self.cut() from None
        self.at = end + 1
        return found

    def count(self, least: int) -> int:
        """How many records of at least so many bytes follow."""
        (number,) = self.take("Q")
        if number * least > len(self.data) - self.at:
            raise self.cut()
        return int(number)


def read_cameras_binary(path: Path) -> dict[int, Lens]:
    """Cameras by number."""
    file, found = _Bytes.of(path), {}
    for _ in range(file.count(24)):
        number, model, width, height = file.take("IiQQ")
        if not 0 <= model < len(NUMBERED):
            raise file.cut()
        name = NUMBERED[model]
        values = file.take(f"{len(MODELS[name])}d") if name in MODELS else ()
        found[number] = lens(path, number, name, width, height, list(values))
    return found


def read_images_binary(path: Path) -> list[Photo]:
    """Pictures, without their 2-D points."""
    file, found = _Bytes.of(path), []
    for _ in range(file.count(73)):
        _, *pose, camera = file.take("I7dI")
        name = file.text()
        file.skip(24 * file.count(24))
        found.append(Photo(name, tuple(pose[:4]), tuple(pose[4:]), camera))
    return found


def read_points_binary(path: Path) -> Cloud:
    """Positions (P, 3), colours (P, 3) in 0 .. 255 and errors (P,)."""
    file = _Bytes.of(path)
    starts = []
    for _ in range(
        file.count(POINT.itemsize)
    ):  # a record's length stands in it, so their places are found one after the other
        starts.append(file.at)
        file.skip(POINT.itemsize - 8)
        file.skip(8 * file.count(8))
    places = np.array(starts, dtype=np.int64)[:, None] + np.arange(POINT.itemsize)
    table = np.frombuffer(file.data, dtype=np.uint8)[places].view(POINT)[:, 0]
    return _checked(path, table["xyz"], table["rgb"].astype(np.float64), table["error"])


def _checked(path: Path, xyz: np.ndarray, rgb: np.ndarray, error: np.ndarray) -> Cloud:
    if not np.isfinite(xyz).all():
        raise InputError(f"{path} holds points with NaN or infinity: export the model again")
    return np.ascontiguousarray(xyz), rgb, np.ascontiguousarray(error)
