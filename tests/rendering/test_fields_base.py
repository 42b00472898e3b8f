from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import lebedev_rule
from torch.nn import functional as F

from limbeck.core import artifacts
from limbeck.core.errors import InputError, LimbeckError, RunError, UnknownNameError
from limbeck.rendering.fields import FAMILIES, Density, VolumeField, VoxelField, build_field, load_field, trunc_exp
from limbeck.rendering.fields.encodings import frequency_encoding, frequency_width, spherical_harmonics

torch.set_num_threads(1)

SMALL = {
    "mlp": {"levels": 3, "depth": 3, "width": 16, "hidden": 16},
    "hash": {"levels": 3, "log2_size": 9, "finest": 24, "hidden": 16},
    "vm": {"resolution": 9, "rank": 2, "colour_rank": 3, "hidden": 16},
    "voxels": {"resolution": 6, "sh_degree": 2},
    "triplane": {"resolution": 9, "features": 5, "hidden": 16},
}
every = pytest.mark.parametrize("family", list(FAMILIES))


def field_of(family: str, **changes: object) -> VolumeField:
    """A small field with parameters that matter (tables that start near 0 would hide mistakes)."""
    torch.manual_seed(0)
    field = build_field(family, {**SMALL[family], **changes})
    with torch.no_grad():
        for parameter in field.encoding_parameters():
            parameter.normal_(0, 0.5)
    return field


def points(n: int = 50, scale: float = 1.9) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(1)
    x = (torch.rand(n, 3, generator=made) - 0.5) * scale
    return x, F.normalize(torch.randn(n, 3, generator=made), dim=-1)


@every
def test_one_interface(family: str):
    field, (x, d) = field_of(family).eval(), points()
    with torch.no_grad():
        found = field(x, d)
    assert set(found) == {"sigma", "rgb", "log_sigma", "feature"}
    assert found["sigma"].shape == found["log_sigma"].shape == (50,) and found["rgb"].shape == (50, 3)
    assert bool((found["sigma"] >= 0).all()) and bool(((found["rgb"] >= 0) & (found["rgb"] <= 1)).all())
    assert float(found["log_sigma"].min()) >= -2 and float(found["log_sigma"].max()) <= 7
    torch.testing.assert_close(found["sigma"], found["log_sigma"].exp())
    sigma, rgb = field.decode(field.encode(x), d)
    torch.testing.assert_close(sigma, found["sigma"])
    torch.testing.assert_close(rgb, found["rgb"])
    torch.testing.assert_close(field.density(x)["sigma"], found["sigma"])
    if field.feature_width is None:
        assert found["feature"] is None
    else:
        assert found["feature"].shape == (50, field.feature_width) == (50, 16)
        torch.testing.assert_close(found["feature"][:, 0], found["log_sigma"])
    assert field(x[:0], d[:0])["rgb"].shape == (0, 3)
    with torch.no_grad():
        turned = field(x, -d)["rgb"]
    assert float((turned - found["rgb"]).abs().max()) > 1e-4, "the colour depends on the direction"


@every
def test_outside_the_box_is_nothing(family: str):
    field = field_of(family, aabb=[[-1, -1, -1], [1, 2, 1]]).eval()
    x = torch.tensor([[0.0, 1.5, 0.0], [0.0, 2.1, 0.0], [0.0, -1.1, 0.0], [1.0, 2.0, 1.0], [-1.0, -1.0, -1.0]])
    found = field.density(x)
    assert (found["sigma"] > 0).tolist() == [True, False, False, True, True]
    assert found["log_sigma"][1:3].tolist() == [-2, -2]


@every
def test_gradients_reach_every_parameter_and_agree_with_finite_differences(family: str):
    field, (x, d) = field_of(family).double(), points(20, scale=1.7)
    x, d = x.double(), d.double()

    def loss() -> torch.Tensor:
        found = field(x, d)
        return found["rgb"].square().sum() + found["log_sigma"].sin().sum() + found["sigma"].mean()

    loss().backward()
    for name, parameter in field.named_parameters():
        gradient = parameter.grad
        assert gradient is not None and float(gradient.abs().max()) > 0, name
        place = int(gradient.abs().argmax())
        with torch.no_grad():
            values, eps = parameter.view(-1), 1e-6
            before = float(values[place])
            values[place] = before + eps
            ahead = float(loss())
            values[place] = before - eps
            behind = float(loss())
            values[place] = before
        assert (ahead - behind) / (2 * eps) == pytest.approx(float(gradient.view(-1)[place]), rel=1e-4), name


@every
def test_saved_and_loaded(family: str, tmp_path: Path):
    changes = {"aabb": [[-1, -1, -1], [1, 1, 2]], "density": {"shift": 0.3, "low": -9.0}}
    field, (x, d) = field_of(family, **changes).eval(), points()
    field.save(tmp_path / "field")
    for again in (load_field(tmp_path / "field"), artifacts.load(tmp_path / "field").content):
        assert type(again) is type(field) and not again.training
        assert again.config() == field.config() and again.density_law == Density(shift=0.3, low=-9.0)
        for name, value in again(x, d).items():
            torch.testing.assert_close(value, field(x, d)[name], rtol=0, atol=0)
    description = json.loads((tmp_path / "field" / "artifact.json").read_text())
    assert description["kind"] == "field" and description["family"] == family


@every
def test_nan_weights_are_named(family: str, tmp_path: Path):
    field, (x, d) = field_of(family), points()
    field.check()
    name, parameter = next(iter(field.named_parameters()))
    with torch.no_grad():
        parameter.view(-1)[0:3] = torch.nan
    for call in (field.check, lambda: field.save(tmp_path)):
        with pytest.raises(InputError, match=f"weight '{name}' has 3 of {parameter.numel()} values that are NaN"):
            call()
    with torch.no_grad():
        parameter.fill_(torch.nan)
    field(x, d)  # in training the run stops on the loss
    for call in (lambda: field.eval()(x, d), lambda: field.density(x)):
        with pytest.raises(InputError, match=f"weight '{name}'") as caught:
            call()
        assert "\n" not in str(caught.value)


@every
def test_param_groups(family: str):
    field = field_of(family)
    groups = field.param_groups(1e-2, 1e-3)
    everything = [p for group in groups for p in group["params"]]
    assert len(everything) == len({id(p) for p in everything}) == len(list(field.parameters()))
    rates = {group["name"]: group["lr"] for group in groups}
    assert (
        rates
        == {
            "mlp": {"decoder": 1e-3},
            "hash": {"encoding": 1e-2, "decoder": 1e-3},
            "vm": {"encoding": 1e-2, "decoder": 1e-3},
            "voxels": {"encoding": 1e-2},
            "triplane": {"encoding": 1e-2, "decoder": 1e-3},
        }[family]
    )
    assert all(group["eps"] == (1e-15 if family == "hash" else 1e-8) for group in groups)
    assert all(group["lr"] == 0.5 for group in field.param_groups(0.5))


def test_truncated_exponential():
    x = torch.tensor([-20.0, -1.0, 0.5, 13.0], dtype=torch.float64, requires_grad=True)
    y = trunc_exp(x)
    torch.testing.assert_close(y, x.exp())
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([-12.0, -1.0, 0.5, 12.0], dtype=torch.float64).exp())


def test_densities_by_hand():
    x = torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.0, 0.4], [0.0, 1.0, 0.0]], dtype=torch.float64)
    raw = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    sigma, log_sigma = Density.generation()(raw, x)
    z = raw.numpy() + 10 * (1 - np.array([0, 0.5, 1.0]) / 0.5)
    np.testing.assert_allclose(sigma, np.log1p(np.exp(z)), rtol=1e-4)
    np.testing.assert_allclose(log_sigma, np.log(np.log1p(np.exp(z))), rtol=1e-4)
    sigma, _ = Density.dreamfusion()(raw, x)
    z = raw.numpy() + 5 * np.exp(-np.array([0, 0.25, 1.0]) / (2 * 0.04))
    np.testing.assert_allclose(sigma, np.exp(z), rtol=1e-6)
    shell = Density.scene()(torch.zeros(2), torch.tensor([[0.0, 0, 0], [5.0, 0, 0]]))[0]
    assert float(shell[0]) < 1e-4 and float(shell[1]) == pytest.approx(10, rel=1e-3)
    plain = Density()(torch.tensor([-5.0, 0.0, 9.0]))
    assert plain[1].tolist() == [-2, 0, 7] and float(plain[0][2]) == pytest.approx(math.exp(7), rel=1e-5)
    deep = torch.tensor([-200.0, -20.0], requires_grad=True)
    sigma, log_sigma = Density("softplus", low=None, high=None)(deep)
    assert log_sigma.tolist() == [-200, -20]
    (gradient,) = torch.autograd.grad(log_sigma.sum(), deep)
    assert gradient.tolist() == [1, 1]
    at_origin = torch.zeros(1, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(Density.generation()(torch.zeros(1), at_origin)[0].sum(), at_origin)
    assert bool(torch.isfinite(gradient).all())


def test_normals_point_outwards():
    """The density of exp(-4 |x|^2) at the vertices: normals are the directions from the centre."""
    field = VoxelField(33, density=Density(low=-30.0)).eval()
    with torch.no_grad():
        field.data[:, 0] = -4 * field.vertices().square().sum(-1).flatten()
    x, _ = points(40, scale=1.2)
    x = x[x.norm(dim=1) > 0.2]
    agreement = (field.normals(x, 0.06) * F.normalize(x, dim=1)).sum(1)
    assert float(agreement.min()) > 0.99
    assert float(field.normals(torch.full((1, 3), 3.0)).abs().max()) == 0


def test_frequencies_by_hand():
    x = torch.tensor([[0.3, -0.7]], dtype=torch.float64)
    found = frequency_encoding(x, 2)[0]
    expected = [0.3, -0.7, *np.sin([0.3, -0.7]), *np.cos([0.3, -0.7]), *np.sin([0.6, -1.4]), *np.cos([0.6, -1.4])]
    np.testing.assert_allclose(found, expected)
    with_pi = frequency_encoding(x, 2, include_input=False, with_pi=True)[0]
    np.testing.assert_allclose(with_pi[:2], np.sin(np.pi * x[0].numpy()))
    for levels, flag in ((3, True), (1, False)):
        assert frequency_encoding(x, levels, flag).shape[-1] == frequency_width(2, levels, flag)
    assert frequency_encoding(x, 0).equal(x)
    with pytest.raises(InputError, match="octave"):
        frequency_encoding(x, 0, include_input=False)


def test_spherical_harmonics_are_orthonormal_and_signed():
    nodes, weights = lebedev_rule(17)
    values = spherical_harmonics(torch.from_numpy(nodes.T.copy()), 3).numpy()
    np.testing.assert_allclose((values * weights[:, None]).T @ values, np.eye(16), atol=1e-8)
    axes = torch.eye(3, dtype=torch.float64)
    np.testing.assert_allclose(
        spherical_harmonics(axes, 1),
        [[0.28209479, *row] for row in ([0, 0, -0.48860251], [-0.48860251, 0, 0], [0, 0.48860251, 0])],
        atol=1e-8,
    )
    d = torch.tensor([0.48, 0.6, 0.64], dtype=torch.float64)
    x, y, z = d.tolist()
    second = [
        1.09254843 * x * y,
        -1.09254843 * y * z,
        0.31539157 * (3 * z * z - 1),
        -1.09254843 * x * z,
        0.54627422 * (x * x - y * y),
    ]
    np.testing.assert_allclose(spherical_harmonics(d, 2)[4:], second, rtol=1e-6)
    # degree 3 as in splatting files: m = -3..3
    third = [
        -0.59004359 * y * (3 * x * x - y * y),
        2.89061144 * x * y * z,
        -0.45704580 * y * (5 * z * z - 1),
        0.37317633 * z * (5 * z * z - 3),
        -0.45704580 * x * (5 * z * z - 1),
        1.44530572 * z * (x * x - y * y),
        -0.59004359 * x * (x * x - 3 * y * y),
    ]
    np.testing.assert_allclose(spherical_harmonics(d, 3)[9:], third, rtol=1e-6)
    for degree, wrong in ((4, d), (1, d[:2])):
        with pytest.raises(InputError, match="degree 0 to 3|3 coordinates"):
            spherical_harmonics(wrong, degree)


def test_bad_input_is_named(tmp_path: Path):
    field, (x, d) = field_of("hash"), points(4)
    with pytest.raises(InputError, match=r"positions are \(N, 3\)"):
        field(x[None], d)
    with pytest.raises(InputError, match="one direction"):
        field(x, d[:3])
    with pytest.raises(InputError, match="are the positions finite"):
        field.eval()(torch.full((1, 3), torch.nan), d[:1])
    with pytest.raises(InputError, match="give decode"):
        build_field("voxels", {"density": {"bias": "blob_magic3d"}}).decode(torch.zeros(1, 13), d[:1])
    with pytest.raises(InputError, match="lowest and highest corner"):
        build_field("vm", {"aabb": [[0, 0, 0], [1, 0, 1]]})
    with pytest.raises(UnknownNameError, match="did you mean hash"):
        build_field("hahs")
    for config in ({"nonsense": 1}, {"density": {"nonsense": 1}}):
        with pytest.raises(InputError, match="cannot be built so.*nonsense"):
            build_field("vm", config)
    for wrong, told in (
        ({"activation": "relu"}, "activation"),
        ({"bias": "cube"}, "bias"),
        ({"std": 0.0}, "width"),
        ({"low": 3.0, "high": 3.0}, "low < high"),
    ):
        with pytest.raises(InputError, match=told):
            Density(**wrong)
    with pytest.raises(RunError, match="does not exist"):
        load_field(tmp_path / "nowhere")
    field_of("mlp").save(tmp_path)
    (tmp_path / "artifact.json").write_text('{"kind": "model"}')
    with pytest.raises(RunError, match="describes no field"):
        load_field(tmp_path)
    (tmp_path / "artifact.json").write_text('{"kind": "field", "family": "vm"}')
    with pytest.raises(LimbeckError, match="does not fit VMField"):
        load_field(tmp_path)
