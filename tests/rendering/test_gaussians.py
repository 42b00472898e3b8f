from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import sph_harm_y

from limbeck.core.errors import InputError
from limbeck.rendering.gaussians import Gaussians, neighbour_distance, rotations, sh_basis

torch.set_num_threads(1)


def unit(count: int) -> torch.Tensor:
    directions = torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(directions, dim=-1)


def test_harmonics_by_scipy():
    """Real harmonics from the complex ones: sqrt(2) Im Y_l|m| for m < 0, sqrt(2) Re Y_lm for m > 0, Condon-Shortley kept."""
    d = unit(50)
    theta, phi = np.arccos(d[:, 2].numpy()), np.arctan2(d[:, 1].numpy(), d[:, 0].numpy())
    rows = []
    for degree in range(4):
        for m in range(-degree, degree + 1):
            value = sph_harm_y(degree, abs(m), theta, phi)
            rows.append(value.real if m == 0 else math.sqrt(2) * (value.imag if m < 0 else value.real))
    np.testing.assert_allclose(sh_basis(d, 3).numpy(), np.stack(rows, 1), atol=1e-12)
    for degree in range(3):
        torch.testing.assert_close(sh_basis(d, degree), sh_basis(d, 3)[:, : (degree + 1) ** 2])
    with pytest.raises(InputError, match="degree of 0 to 3"):
        sh_basis(d, 4)


def test_rotations():
    quats = torch.randn(20, 4, dtype=torch.float64)
    found = rotations(quats)
    torch.testing.assert_close(found @ found.mT, torch.eye(3).double().expand(20, 3, 3))
    torch.testing.assert_close(torch.linalg.det(found), torch.ones(20).double())
    torch.testing.assert_close(rotations(-3 * quats), found)
    quarter = rotations(torch.tensor([math.cos(math.pi / 4), 0, 0, math.sin(math.pi / 4)]))  # about z: x goes to y
    torch.testing.assert_close(quarter @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]), atol=1e-6, rtol=0)


def test_covariances_have_the_squared_scales_as_eigenvalues():
    torch.manual_seed(0)
    scene = Gaussians(torch.zeros(6, 3), torch.randn(6, 3), torch.randn(6, 4), torch.zeros(6), torch.zeros(6, 4, 3))
    values = torch.linalg.eigvalsh(scene.covariances())
    torch.testing.assert_close(values, (2 * scene.log_scales).exp().sort(1).values, rtol=1e-4, atol=1e-5)


def test_from_points():
    points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3], [9, 9, 9]])
    colours = torch.rand(5, 3)
    scene = Gaussians.from_points(points, colours, sh_degree=2)
    assert len(scene) == 5 and scene.sh_degree == 2 and scene.sh.shape == (5, 9, 3)
    assert scene.scales[0].tolist() == pytest.approx([math.sqrt((1 + 4 + 9) / 3)] * 3)
    torch.testing.assert_close(scene.colours(torch.tensor([5.0, 1, 2])), colours)
    torch.testing.assert_close(scene.opacities, torch.full((5,), 0.1))
    torch.testing.assert_close(scene.covariances()[0], 14 / 3 * torch.eye(3))
    same = neighbour_distance(torch.zeros(4, 3))
    assert bool((same > 0).all()) and bool((neighbour_distance(torch.ones(1, 3)) > 0).all())
    groups = list(scene.param_groups(extent=2.0))
    assert sum(len(g["params"]) for g in groups) == len(list(scene.parameters())) and groups[0]["lr"] == 3.2e-4


def test_colours_depend_on_the_direction():
    sh = torch.zeros(1, 4, 3)
    sh[0, 2, 0] = 1  # Y_10 = 0.4886 z of red
    scene = Gaussians(torch.zeros(1, 3), torch.zeros(1, 3), torch.ones(1, 4), torch.zeros(1), sh)
    below, above = scene.colours(torch.tensor([0.0, 0, -2])), scene.colours(torch.tensor([0.0, 0, 2]))
    torch.testing.assert_close(below[0], torch.tensor([0.5 + 0.48860251, 0.5, 0.5]))
    torch.testing.assert_close(above[0], torch.tensor([0.5 - 0.48860251, 0.5, 0.5]))
    torch.testing.assert_close(scene.colours(torch.tensor([0.0, 0, 2]), degree=0)[0], torch.full((3,), 0.5))
    scene.sh0.data.fill_(-9)
    assert float(scene.colours(torch.tensor([0.0, 0, -2])).max()) == 0


def gsplat_parameters(count: int = 4, rest: int = 8) -> dict[str, torch.Tensor]:
    shapes = {"means": (3,), "scales": (3,), "quats": (4,), "opacities": (), "sh0": (1, 3), "shN": (rest, 3)}
    return {name: torch.randn(count, *shape) for name, shape in shapes.items()}


def test_gsplat_parameters_are_ours_under_other_names():
    params = gsplat_parameters()
    for given in (params, {"step": 7, "splats": params}, torch.nn.ParameterDict(params)):
        scene = Gaussians.from_gsplat(given)
        torch.testing.assert_close(scene.scales, params["scales"].exp())
        torch.testing.assert_close(scene.opacities, params["opacities"].sigmoid())
        assert scene.sh_degree == 2 and scene.sh.equal(torch.cat([params["sh0"], params["shN"]], 1))
        back = scene.to_gsplat()
        assert all(back[name].equal(value) for name, value in params.items())
    back["opacities"].data.fill_(0.0)
    assert scene.opacities.tolist() == [0.5] * 4, "what changes there changes here"
    assert not bool((params["opacities"] == 0).any()), "what was given stays as it was"
    del params["shN"]
    params["opacities"] = params["opacities"][:, None]
    assert Gaussians.from_gsplat(params).sh_degree == 0
    with pytest.raises(InputError, match="lack sh0: there are means, .*colors .colours that a network decodes"):
        Gaussians.from_gsplat({**{k: v for k, v in params.items() if k != "sh0"}, "colors": params["means"]})
    with pytest.raises(InputError, match="sh0 is"):
        Gaussians.from_gsplat({**params, "sh0": params["means"]})
    with pytest.raises(InputError, match="quats of 4"):
        Gaussians.from_gsplat({**params, "quats": params["means"]})


def test_bad_input_is_named():
    with pytest.raises(InputError, match="NaN or infinity"):
        Gaussians.from_points(torch.tensor([[0.0, float("nan"), 0]]))
    with pytest.raises(InputError, match="points must be"):
        Gaussians.from_points(torch.zeros(0, 3))
    with pytest.raises(InputError, match="colours must be"):
        Gaussians.from_points(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(InputError, match="between 0 and 1"):
        Gaussians.from_points(torch.zeros(2, 3), opacity=1.0)
    with pytest.raises(InputError, match="quats of 2 Gaussians"):
        Gaussians(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, 1, 3))
    with pytest.raises(InputError, match="spherical harmonics of 2"):
        Gaussians(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2), torch.zeros(2, 5, 3))
