from __future__ import annotations

import pytest
import torch

from limbeck.core.errors import InputError, UnknownNameError
from limbeck.rendering.cameras import orbit
from limbeck.rendering.rays import Rays
from limbeck.rendering.scenes import SCENES, AnalyticScene, box, disc, scene, shots, torus
from limbeck.rendering.volume import render_image

torch.set_num_threads(1)


def test_distances_by_hand():
    x = torch.tensor([[2.0, 0, 0], [0, 0, 0], [2, 3, 0]])
    torch.testing.assert_close(box(x, (0, 0, 0), (1, 2, 3)), torch.tensor([1.0, -1.0, 2**0.5]))
    torch.testing.assert_close(torus(x[:2], 0.5, 0.2), torch.tensor([1.3, 0.3]))
    torch.testing.assert_close(disc(x[:2], 0.5, 1.0, 0.1), torch.tensor([(1 + 0.16) ** 0.5, 0.4]))


@pytest.mark.parametrize("name", SCENES)
def test_distances_never_overshoot(name: str):
    """|sdf(x) - sdf(y)| <= |x - y|: what sphere tracing rests on; colours and densities keep their ranges."""
    field, g = scene(name), torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 3000, 3, generator=g) * 2 - 1
    assert bool(((field.distance(x) - field.distance(y)).abs() <= (x - y).norm(dim=-1) + 1e-5).all())
    found = field(x, torch.nn.functional.normalize(y, dim=-1))
    rgb, sigma = found["rgb"], found["sigma"]
    assert rgb.shape == (3000, 3) and float(rgb.min()) >= 0 and float(rgb.max()) <= 1
    assert float(sigma.min()) >= 0 and 40 < float(sigma.max()) <= 55.001
    torch.testing.assert_close(found["log_sigma"].exp(), sigma)


def test_tracing_a_sphere_by_hand():
    ball = scene("split_sphere")
    rays = Rays(torch.tensor([[-3.0, 0.3, 0], [-3, 0.9, 0]]), torch.tensor([[1.0, 0, 0], [1, 0, 0]]))
    t, hit = ball.trace(rays)
    assert hit.tolist() == [True, False]
    assert float(t[0]) == pytest.approx(3 - (0.36 - 0.09) ** 0.5, abs=1e-3)
    torch.testing.assert_close(ball.normals(torch.tensor([[0.0, 0.6, 0]])), torch.tensor([[0.0, 1, 0]]))


def test_surface_and_density_show_the_same():
    field, cameras = scene("three_blobs"), orbit([10.0, 130.0], 20.0, 3.0, 45.0, 24, 24)
    surface, volume = field.surface_image(cameras), render_image(field, cameras, samples=128)
    assert float((surface["rgb"] - volume["rgb"]).abs().mean()) < 0.05
    assert float((surface["opacity"] - volume["opacity"]).abs().mean()) < 0.03
    solid = (surface["opacity"] > 0) & (volume["opacity"] > 0.99)
    assert float((surface["depth"] - volume["depth"])[solid].abs().median()) < 0.03


def test_the_face_looks_along_x():
    """The mouth's red shows from azimuth 0 only; the hair from 180."""
    views = scene("faced_sphere").surface_image(orbit([0.0, 90.0, 180.0], 0.0, 3.0, 30.0, 32, 32))["rgb"]
    red = ((views - torch.tensor([0.8, 0.1, 0.1])).abs().amax(-1) < 0.01).flatten(1).sum(1)
    assert int(red[0]) > 5 and int(red[2]) == 0
    hair = ((views - torch.tensor([0.35, 0.2, 0.1])).abs().amax(-1) < 0.01).flatten(1).sum(1)
    assert int(hair[2]) > 50 and int(hair[0]) == 0


def test_seeds():
    a, b = (
        shots(scene("textured_shapes", 3), 2, 12, seed=1, samples=32),
        shots(scene("textured_shapes", 3), 2, 12, seed=1, samples=32),
    )
    assert torch.equal(a.images, b.images) and a.images.shape == (2, 12, 12, 3)
    other = shots(scene("textured_shapes", 4), 2, 12, seed=1, samples=32)
    assert not torch.allclose(a.images, other.images)
    assert torch.allclose(a.images[:, 0, 0], torch.ones(2, 3)) and float(a.opacity.max()) > 0.99


def test_bad_input_is_named():
    with pytest.raises(UnknownNameError, match="three_blobs"):
        scene("three_blob")
    with pytest.raises(InputError, match="1 view or more"):
        shots(scene("split_sphere"), 0)
    with pytest.raises(InputError, match="peak density"):
        AnalyticScene(torch.Tensor.sum, torch.Tensor.sin, peak=0.0)
