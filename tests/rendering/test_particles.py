from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import limbeck
from limbeck.core.errors import InputError
from limbeck.rendering.cameras import orbit
from limbeck.rendering.fields import Density, TexturedField, build_field, load_field
from limbeck.rendering.gaussians import Gaussians
from limbeck.rendering.particles import REGULARISERS, SampleParticles, SceneParticles
from limbeck.rendering.renderers import SplatRenderer, VolumeRenderer
from limbeck.rendering.splatting import splat
from limbeck.rendering.starts import STARTS, fresh_scenes
from limbeck.rendering.volume import normals_of, render_image

torch.set_num_threads(1)
CAMERAS = orbit([0.0, 90.0, 200.0], 20.0, 3.0, 45.0, 8, 8)


def test_samples_are_drawn_by_their_numbers():
    particles = SampleParticles(torch.arange(12.0).view(4, 3))
    drawn = particles.draw(torch.tensor([2, 0]))["images"]
    assert drawn.tolist() == [[6, 7, 8], [0, 1, 2]] and drawn.requires_grad


def test_a_scene_is_drawn_as_the_renderer_draws_it():
    particles = fresh_scenes("voxels", 2, resolution=6, samples=16).eval()
    found = particles.draw(torch.tensor([1]), CAMERAS)
    wanted = render_image(particles.fields[1], CAMERAS, samples=16)
    torch.testing.assert_close(found["images"], wanted["rgb"].movedim(-1, 1))
    torch.testing.assert_close(found["opacity"], wanted["opacity"])
    again = VolumeRenderer(particles.fields[1], 16)(CAMERAS)
    torch.testing.assert_close(again["rgb"], wanted["rgb"])
    assert len(particles.renderers()) == 2


def test_terms_are_those_of_the_regularisers():
    particles = SceneParticles([fresh_scenes("voxels", 1, resolution=6).fields[0]], 16, terms=REGULARISERS).eval()  # type: ignore[list-item]
    found = particles.draw(torch.tensor([0]), CAMERAS)
    assert set(REGULARISERS) <= set(found)
    o = found["opacity"]
    torch.testing.assert_close(found["sparsity"], (o**2 + 0.01).sqrt().mean())
    torch.testing.assert_close(found["variation"], particles.fields[0].total_variation())  # type: ignore[operator]
    maps = found["normals"]
    assert maps.shape == (3, 3, 8, 8)
    # a blob's middle faces the viewer: view-space normal (0, 0, 1)
    middle = maps[:, :, 3:5, 3:5].mean((0, 2, 3))
    torch.testing.assert_close(middle[:2], torch.tensor([0.5, 0.5]), atol=0.05, rtol=0)
    assert middle[2] > 0.7  # shorter than 1: behind the middle normals point away


def test_normal_maps_are_in_the_cameras_axes():
    field = fresh_scenes("voxels", 1, resolution=6).fields[0]
    side = normals_of(field, torch.tensor([[0.0, 0.4, 0.0]]), 1e-2)
    assert side[0, 1] > 0.9
    right = (
        SceneParticles([field], 32, terms=("smooth",))
        .eval()
        .draw(torch.tensor([0]), orbit([0.0], 0.0, 3.0, 45.0, 9, 9))
    )  # type: ignore[list-item]
    row = right["normals"][0, 0, 4]
    assert row[3] < 0.5 < row[5]  # normals left of the middle point left


@pytest.mark.parametrize("name", sorted(STARTS))
def test_starts_are_what_they_say(name: str):
    field = fresh_scenes("voxels", 1, name, 6).fields[0]
    inner = field.density(torch.zeros(1, 3))["sigma"].item()  # type: ignore[operator]
    outer = field.density(torch.tensor([[0.9 * float(field.aabb[1, 0]), 0.0, 0.0]]))["sigma"].item()  # type: ignore[operator, index]
    assert (inner > 10 * outer) if name != "scene" else (outer > 1 > 0.1 > inner)


def test_grids_start_apart_and_the_first_does_not():
    fields = fresh_scenes("voxels", 3, resolution=4).fields
    assert not fields[0].data[:, 1:].any()
    assert not torch.equal(fields[1].data, fields[2].data)


def test_one_particle_is_saved_as_a_field_and_several_as_fields(tmp_path: Path):
    one = fresh_scenes("voxels", 1, resolution=4)
    one.save(tmp_path / "one")
    assert limbeck.load(tmp_path / "one").kind == "field"
    several = fresh_scenes("vm", 2, resolution=4)
    several.save(tmp_path / "several")
    made = limbeck.load(tmp_path / "several")
    assert made.kind == "fields" and len(made.content) == 2
    torch.testing.assert_close(made.content[1].planes, several.fields[1].planes)


def test_texture_on_a_fixed_shape(tmp_path: Path):
    torch.manual_seed(0)
    shape = build_field("voxels", {"resolution": 5, "density": Density("softplus", low=None, high=None)})
    shape.data.data.normal_()
    colours = build_field("hash", {"levels": 2, "density": shape.density_law})
    made = TexturedField(shape, colours)
    x, d = 2 * torch.rand(20, 3) - 1, torch.nn.functional.normalize(torch.randn(20, 3), dim=1)
    found = made(x, d)
    torch.testing.assert_close(found["sigma"], shape(x, d)["sigma"])
    torch.testing.assert_close(found["rgb"], colours(x, d)["rgb"])
    (found["sigma"].sum() + found["rgb"].sum()).backward()  # type: ignore[union-attr]
    assert shape.data.grad is None and colours.encoding.table.grad is not None
    made.eval().save(tmp_path)
    again = load_field(tmp_path)
    torch.testing.assert_close(again(x, d)["rgb"], found["rgb"])
    with pytest.raises(InputError, match="need one box"):
        TexturedField(shape, build_field("voxels", {"resolution": 4, "aabb": [[-2.0] * 3, [2.0] * 3]}))


def test_noise_on_densities_is_for_training_only():
    field = fresh_scenes("voxels", 1, resolution=4).fields[0]
    field.density_noise = 1.0
    x = torch.zeros(1, 3)
    trained = {field.train().density(x)["sigma"].item() for _ in range(3)}  # type: ignore[operator]
    judged = {field.eval().density(x)["sigma"].item() for _ in range(3)}  # type: ignore[operator]
    assert len(trained) == 3 and len(judged) == 1


def test_gaussians_are_drawn_camera_by_camera():
    torch.manual_seed(0)
    gaussians = Gaussians.from_points(0.3 * torch.randn(20, 3), torch.rand(20, 3), 0)
    found = SplatRenderer(gaussians, 1.0)(CAMERAS, [2, 0])
    assert found["rgb"].shape == (2, 8, 8, 3) and found["opacity"].shape == found["depth"].shape == (2, 8, 8)
    torch.testing.assert_close(found["rgb"][0], splat(gaussians, CAMERAS, 1.0, index=2).rgb)


def test_mistakes_get_one_clear_line():
    with pytest.raises(InputError, match="one field or more"):
        SceneParticles([])
    with pytest.raises(InputError, match="no regulariser 'sparse'"):
        SceneParticles([build_field("voxels", {"resolution": 4})], terms=("sparse",))
    with pytest.raises(InputError, match="seen through cameras"):
        fresh_scenes("voxels", resolution=4).draw(torch.tensor([0]), None)
    with pytest.raises(InputError, match="finite"):
        SampleParticles(torch.full((1, 1), math.inf))
