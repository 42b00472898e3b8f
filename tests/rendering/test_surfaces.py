from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from limbeck.core.errors import InputError
from limbeck.rendering.fields import VoxelField
from limbeck.rendering.surfaces import density_grid, extract_mesh

torch.set_num_threads(1)
pytest.importorskip("skimage")
trimesh = pytest.importorskip("trimesh")


def ball(radius: float = 0.6) -> VoxelField:
    field = VoxelField(41, 0, aabb=[[-1, -1, -1], [1, 1, 2]], density={"low": -30.0, "high": 20.0})
    with torch.no_grad():
        field.data[:, 0] = 10 * (radius - field.vertices().norm(dim=-1).flatten())
        field.data[:, 1] = 20.0
    return field.eval()


def test_a_ball():
    mesh = extract_mesh(ball(), 1.0, 41)
    np.testing.assert_allclose(mesh.vertices.norm(dim=1), 0.6, atol=0.02)
    assert float((mesh.normals * F.normalize(mesh.vertices, dim=1)).sum(1).min()) > 0.95
    solid = trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy(), process=False)
    assert solid.is_watertight and solid.volume == pytest.approx(4 / 3 * math.pi * 0.6**3, rel=0.05)
    assert mesh.colours is not None and float(mesh.colours[:, 0].min()) > 0.9
    torch.testing.assert_close(mesh.colours[:, 1], torch.full((len(mesh.vertices),), 0.5))


def test_the_grid_and_closing_at_the_box():
    field = ball(5.0)
    assert float(density_grid(field, 5)[2, 2, 4]) == pytest.approx(math.exp(20), rel=1e-3)
    solid = extract_mesh(field, 1.0, 9)
    assert trimesh.Trimesh(solid.vertices.numpy(), solid.faces.numpy(), process=True).volume == pytest.approx(
        12, rel=1e-3
    )


@pytest.mark.parametrize("ending", [".ply", ".obj", ".glb"])
def test_files(tmp_path: Path, ending: str):
    mesh = extract_mesh(ball(), None, 21)
    mesh.export(tmp_path / f"ball{ending}")
    again = trimesh.load(tmp_path / f"ball{ending}", force="mesh", process=False)
    wanted = mesh.vertices.numpy()
    if ending == ".glb":
        wanted = np.stack([wanted[:, 0], wanted[:, 2], -wanted[:, 1]], 1)
    np.testing.assert_allclose(again.vertices, wanted, atol=1e-5)
    assert len(again.faces) == len(mesh.faces)


def test_bad_input_is_named(tmp_path: Path):
    with pytest.raises(InputError, match="no surface at a density of 1e"):
        extract_mesh(ball(), 1e9, 9)
    with pytest.raises(InputError, match="at least 2 points"):
        density_grid(ball(), 1)
    with pytest.raises(InputError, match="written as .ply"):
        extract_mesh(ball(), 1.0, 9).export(tmp_path / "ball.stl")
    broken = ball()
    broken.data.data[0] = torch.nan
    with pytest.raises(InputError, match="NaN or infinite"):
        extract_mesh(broken, 1.0, 9)
