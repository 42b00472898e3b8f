from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from limbeck.core.errors import InputError
from limbeck.rendering.fields import VoxelField, load_field
from limbeck.rendering.surfaces import density_grid, extract_mesh, load_grid
from limbeck.rendering.volume import OccupancyGrid

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


@pytest.mark.parametrize("name", ["ball", "ball.npz", "ball.ply", "ball.obj", "ball.glb"])
def test_export_follows_the_path(tmp_path: Path, name: str):
    field, path = ball(), tmp_path / "new" / name
    assert field.export(path, 21, 1.0) == path
    if not path.suffix:
        torch.testing.assert_close(load_field(path).state_dict(), field.state_dict())
    elif path.suffix == ".npz":
        density, occupancy, aabb = load_grid(path)
        torch.testing.assert_close(density, density_grid(field, 21))
        assert occupancy.equal(density > 1.0) and aabb.equal(field.aabb)
        radius = torch.stack(
            torch.meshgrid(*(torch.linspace(*s, 21) for s in ((-1, 1), (-1, 1), (-1, 2))), indexing="ij")
        ).norm(dim=0)
        assert occupancy.equal(radius < 0.6) or float((occupancy != (radius < 0.6)).float().mean()) < 0.01
    else:
        mesh = trimesh.load(path, force="mesh", process=False)
        assert len(mesh.faces) == len(extract_mesh(field, 1.0, 21).faces)


def test_an_export_carries_the_grid_that_was_trained_with(tmp_path: Path):
    field = ball()
    grid = OccupancyGrid(field.aabb, 8)
    grid.refresh(field)
    field.export(tmp_path / "ball.npz", 5, occupancy=grid.occupied)
    assert load_grid(tmp_path / "ball.npz")[1].equal(grid.occupied) and not bool(grid.occupied.all())


def test_damaged_grids_and_endings_are_named(tmp_path: Path):
    path = tmp_path / "ball.npz"
    ball().export(path, 5)
    path.write_bytes(path.read_bytes()[:100])
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    np.save(tmp_path / "one.npy", np.zeros(3))
    for damaged in ("ball.npz", "other.npz", "one.npy"):
        with pytest.raises(InputError, match="holds no density grid"):
            load_grid(tmp_path / damaged)
    with pytest.raises(InputError, match="does not exist"):
        load_grid(tmp_path / "none.npz")
    with pytest.raises(InputError, match=r"written as a folder, .npz, .ply, .obj, .glb \(got 'ball.pt'\)"):
        ball().export(tmp_path / "ball.pt")


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
