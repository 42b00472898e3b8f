"""Gaussians as ``.ply`` files in the layout that viewers of 3-D Gaussian splatting read.

One vertex per Gaussian, 4-byte floats, binary and little-endian: x y z, nx ny nz (zeros), f_dc_0..2, f_rest_* (channel by channel:
all of red, then green, then blue), opacity (logit), scale_0..2 (logarithms), rot_0..3 (w x y z).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.core.files import atomic_path
from limbeck.rendering.gaussians import Gaussians

_TYPES = {
    **dict.fromkeys(("char", "int8"), "i1"),
    **dict.fromkeys(("uchar", "uint8"), "u1"),
    **dict.fromkeys(("short", "int16"), "i2"),
    **dict.fromkeys(("ushort", "uint16"), "u2"),
    **dict.fromkeys(("int", "int32"), "i4"),
    **dict.fromkeys(("uint", "uint32"), "u4"),
    **dict.fromkeys(("float", "float32"), "f4"),
    **dict.fromkeys(("double", "float64"), "f8"),
}
_ORDERS = {"binary_little_endian": "<", "binary_big_endian": ">", "ascii": ""}


def names_of(rest: int) -> list[str]:
    """The properties in their order, with so many f_rest (0, 9, 24 or 45)."""
    return [
        *("x", "y", "z", "nx", "ny", "nz"),
        *(f"f_dc_{i}" for i in range(3)),
        *(f"f_rest_{i}" for i in range(rest)),
        "opacity",
        *(f"scale_{i}" for i in range(3)),
        *(f"rot_{i}" for i in range(4)),
    ]


def save_ply(gaussians: Gaussians, path: str | Path) -> Path:
    """Write Gaussians for viewers; quaternions are written with length 1.

    Raises:
        InputError: parameters that are not finite. RunError: the file cannot be written.
    """
    path = Path(path)
    for name, values in gaussians.named_parameters():
        if not bool(torch.isfinite(values).all()):
            raise InputError(f"{name} of the Gaussians contain NaN or infinity: prune them before the export to {path}")
    with torch.no_grad():
        columns: list[Tensor] = [
            gaussians.means,
            torch.zeros_like(gaussians.means),
            gaussians.sh0.flatten(1),
            gaussians.sh_rest.mT.flatten(1),
            gaussians.opacity_logits[:, None],
            gaussians.log_scales,
            torch.nn.functional.normalize(gaussians.quats, dim=-1),
        ]
        table = torch.cat([c.detach().cpu().float() for c in columns], 1).numpy().astype("<f4")
    names = names_of(3 * gaussians.sh_rest.shape[1])
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(table)}"]
    header += [f"property float {name}" for name in names] + ["end_header", ""]
    with atomic_path(path) as temporary:
        temporary.write_bytes("\n".join(header).encode("ascii") + table.tobytes())
    return path


def load_ply(path: str | Path) -> Gaussians:
    """Read Gaussians from a ``.ply`` of 3-D Gaussian splatting: binary or ascii, properties in any order, further ones ignored.

    Raises:
        InputError: no such file, no ``.ply``, a point cloud or mesh, a compressed variant, a file cut short, numbers that are not
            finite.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    columns = _vertices(path, data)
    needed = [name for name in names_of(0) if name not in ("nx", "ny", "nz")]
    if missing := [name for name in needed if name not in columns]:
        if "packed_position" in columns:
            raise InputError(f"{path} is a compressed .ply: convert it to the uncompressed layout first")
        raise InputError(
            f"{path} holds no Gaussians but another kind of .ply (it lacks {', '.join(missing[:4])}): "
            "start from points with Gaussians.from_points instead"
        )
    rest = sum(name.startswith("f_rest_") for name in columns)
    if rest not in (0, 9, 24, 45) or any(f"f_rest_{i}" not in columns for i in range(rest)):
        raise InputError(f"{path} has {rest} properties f_rest_*: 0, 9, 24 or 45 make harmonics of degree 0 to 3")
    for name in (*needed, *(f"f_rest_{i}" for i in range(rest))):
        if not np.isfinite(columns[name]).all():
            raise InputError(f"{path} holds NaN or infinity in {name}: export it again, or remove those Gaussians")

    def gather(*names: str) -> Tensor:
        return torch.from_numpy(np.stack([columns[name].astype(np.float32) for name in names], 1))

    base = gather("f_dc_0", "f_dc_1", "f_dc_2")[:, None]
    further = gather(*(f"f_rest_{i}" for i in range(rest))).unflatten(1, (3, -1)).mT if rest else base[:, :0]
    return Gaussians(
        gather("x", "y", "z"),
        gather("scale_0", "scale_1", "scale_2"),
        gather("rot_0", "rot_1", "rot_2", "rot_3"),
        gather("opacity")[:, 0],
        torch.cat([base, further], 1),
    )


def _vertices(path: Path, data: bytes) -> dict[str, np.ndarray]:
    """The columns of the element ``vertex``."""
    end = data.find(b"end_header")
    if not data.startswith((b"ply\n", b"ply\r\n")) or end < 0:
        raise InputError(f"{path} is not a .ply file: it does not begin with a header of that format")
    body = data.find(b"\n", end) + 1 or len(data)
    elements: list[tuple[str, int, list[tuple[str, str]]]] = []
    order = None
    try:
        for line in data[:end].decode("ascii", "replace").splitlines():
            words = line.split()
            if words[:1] == ["format"]:
                order = _ORDERS[words[1]]
            elif words[:1] == ["element"]:
                elements.append((words[1], int(words[2]), []))
            elif words[:1] == ["property"]:
                kind = "list" if words[1] == "list" else _TYPES[words[1]]
                elements[-1][2].append((words[-1], kind))
    except (IndexError, KeyError, ValueError):
        raise InputError(f"{path} has a damaged header: the line '{line.strip()[:60]}' is not understood") from None
    if order is None:
        raise InputError(f"{path} has a damaged header: it names no format")
    values = data[body:].split() if order == "" else []
    begin = 0  # in words of an ascii file, else in bytes
    for name, count, properties in elements:
        if any(kind == "list" for _, kind in properties):
            if name == "vertex" or all(other != "vertex" for other, _, _ in elements):
                break
            raise InputError(f"{path} has lists before its vertices, as no .ply of Gaussians has: is it a mesh?")
        layout = np.dtype([(key, (order or "<") + kind) for key, kind in properties])
        step = len(properties) if order == "" else layout.itemsize
        stop = begin + count * step
        if name == "vertex":
            if count < 1:
                raise InputError(f"{path} holds no Gaussians: its element vertex is empty")
            if stop > (len(values) if order == "" else len(data) - body):
                raise InputError(
                    f"{path} is cut short: its header promises {count} vertices; copy or download it again"
                )
            if order == "":
                try:
                    numbers = np.array(values[begin:stop], dtype=np.float64).reshape(count, step)
                except ValueError:
                    raise InputError(
                        f"{path} is damaged: among its vertices stands something that is no number"
                    ) from None
                return {key: numbers[:, k] for k, (key, _) in enumerate(properties)}
            table = np.frombuffer(data, layout, count, body + begin)
            return {key: table[key] for key, _ in properties}
        begin = stop
    raise InputError(f"{path} holds no Gaussians: it has no element vertex with plain properties")
