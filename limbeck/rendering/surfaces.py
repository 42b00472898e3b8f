"""Density fields for other programs: a triangle mesh by marching cubes, with normals, or a grid of densities."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.errors import InputError, MissingDependencyError
from limbeck.core.files import atomic_path
from limbeck.rendering.fields.base import VolumeField

FORMATS = (".ply", ".obj", ".glb")


@dataclass
class Mesh:
    """Vertices (V, 3) in world units (+Z up), faces (T, 3) counter-clockwise from outside, unit outward normals (V, 3), colours (V, 3) in [0, 1]."""

    vertices: Tensor
    faces: Tensor
    normals: Tensor
    colours: Tensor | None = None

    def export(self, path: str | Path) -> None:
        """Write ``.ply``, ``.obj`` or ``.glb``; glTF is +Y up, so ``.glb`` is turned by -90 degrees about X.

        Raises:
            InputError: another ending. MissingDependencyError: no trimesh. RunError: the file cannot be written.
        """
        target = Path(path)
        if target.suffix.lower() not in FORMATS:
            raise InputError(f"a mesh is written as {', '.join(FORMATS)} (got '{target.name}')")
        try:
            import trimesh
        except ImportError:
            raise MissingDependencyError("trimesh", "fields", "writing a mesh") from None
        points, normals = self.vertices, self.normals
        if target.suffix.lower() == ".glb":
            points, normals = (torch.stack([v[:, 0], v[:, 2], -v[:, 1]], 1) for v in (points, normals))
        colours = None if self.colours is None else (self.colours.clamp(0, 1) * 255).round().byte().numpy()
        mesh = trimesh.Trimesh(
            points.numpy(), self.faces.numpy(), vertex_normals=normals.numpy(), vertex_colors=colours, process=False
        )
        with atomic_path(target) as temporary, open(temporary, "wb") as file:
            mesh.export(file, file_type=target.suffix.lower()[1:])


@torch.no_grad()
def density_grid(field: VolumeField, resolution: int = 64, chunk: int = 65536) -> Tensor:
    """Densities (R, R, R), indexed [x, y, z], on a lattice whose outer points lie on the faces of the field's box."""
    if resolution < 2:
        raise InputError(f"a density grid has at least 2 points an axis (got {resolution})")
    field.check()
    low, high = field.aabb
    steps = torch.linspace(0, 1, resolution, device=low.device)
    unit = torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij"), -1).view(-1, 3)
    parts = [field.density(low + (high - low) * piece)["sigma"] for piece in unit.split(chunk)]
    return torch.cat([part for part in parts if part is not None]).view(resolution, resolution, resolution)


@torch.no_grad()
def extract_mesh(field: VolumeField, threshold: float | None = None, resolution: int = 64) -> Mesh:
    """The surface where the density is ``threshold``, closed at the faces of the box.

    Args:
        threshold: 10 to 25 suits reconstructions; None takes the mean density, which suits generated objects.
        resolution: lattice points an axis.

    Returns:
        A mesh on the CPU; colours are those seen from straight outside.

    Raises:
        InputError: no density crosses the threshold; NaN weights. MissingDependencyError: no scikit-image.
    """
    try:
        from skimage.measure import marching_cubes
    except ImportError:
        raise MissingDependencyError("scikit-image", "fields", "extracting a mesh") from None
    grid = density_grid(field, resolution).float().cpu()
    level = float(grid.mean()) if threshold is None else float(threshold)
    if not 0 < level < float(grid.max()):
        raise InputError(
            f"no surface at a density of {level:.4g}: the field's densities span {float(grid.min()):.4g} to {float(grid.max()):.4g}"
        )
    padded = F.pad(grid, (1,) * 6)  # nothing outside the box: solids that reach its faces are closed there
    found, faces, normals, _ = marching_cubes(padded.numpy(), level)
    low, high = field.aabb.cpu()
    index = (torch.from_numpy(found.copy()) - 1).clamp(0, resolution - 1)
    vertices = low + (high - low) * index / (resolution - 1)
    # the gradient is per lattice step; steps differ where the box is no cube
    outward = F.normalize(torch.from_numpy(normals.copy()) / (high - low), dim=1)
    place, seen = vertices.to(field.aabb.device), -outward.to(field.aabb.device)
    colours = torch.cat([field(x, d)["rgb"] for x, d in zip(place.split(65536), seen.split(65536), strict=True)])
    triangles = (
        torch.from_numpy(faces.copy()).long().flip(1)
    )  # marching cubes winds them clockwise here, seen from outside
    return Mesh(vertices, triangles, outward, colours.float().cpu())


def export_field(
    field: VolumeField,
    path: str | Path,
    resolution: int = 128,
    threshold: float | None = None,
    occupancy: Tensor | None = None,
) -> Path:
    """Write a field for other programs, as the path says.

    ==========================  =============================================================================================
    a folder (no ending)        weights and constructor, which ``load_field`` reads: everything there is
    ``.npz``                    ``density`` (R, R, R) indexed [x, y, z] with outer points on the box's faces, ``occupancy`` (bool),
                                ``aabb`` (2, 3): see :func:`load_grid`
    ``.ply``, ``.obj``, ``.glb``  a coloured triangle mesh: see :func:`extract_mesh`
    ==========================  =============================================================================================

    Args:
        path: where to. resolution: R, lattice points an axis of grid and mesh.
        threshold: density of the surface (None: the mean), and above which a cell of the grid counts as occupied (None: 0.01).
        occupancy: (M, M, M) bool, cells that are occupied, of an ``OccupancyGrid`` for one; None: from the density.

    Returns:
        the path.

    Raises:
        InputError: another ending, NaN weights, no surface there. RunError: it cannot be written.
    """
    target = Path(path)
    ending = target.suffix.lower()
    if target.is_dir() or not ending:
        field.save(target)
    elif ending == ".npz":
        density = density_grid(field, resolution).float().cpu()
        full = density > (0.01 if threshold is None else threshold) if occupancy is None else occupancy.bool().cpu()
        with atomic_path(target) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(
                file, density=density.numpy(), occupancy=full.numpy(), aabb=field.aabb.float().cpu().numpy()
            )
    elif ending in FORMATS:
        extract_mesh(field, threshold, resolution).export(target)
    else:
        raise InputError(f"a field is written as a folder, .npz, {', '.join(FORMATS)} (got '{target.name}')")
    return target


def load_grid(path: str | Path) -> tuple[Tensor, Tensor, Tensor]:
    """Density (R, R, R), occupancy (M, M, M) bool and box (2, 3) that :func:`export_field` wrote as ``.npz``.

    Raises:
        InputError: no such file, another kind of file, or one that is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            density, occupancy, aabb = (torch.from_numpy(file[name]) for name in ("density", "occupancy", "aabb"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: is the path the right one?") from None
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, AttributeError, TypeError):
        raise InputError(f"{path} holds no density grid: export the field to .npz again") from None
    return density, occupancy, aabb
