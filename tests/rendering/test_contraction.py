from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from limbeck.core.errors import InputError
from limbeck.rendering.contraction import FOLDED, ContractedField, contract, expand
from limbeck.rendering.fields import VolumeField, build_field, load_field
from limbeck.rendering.rays import Rays, bin_edges, stratified
from limbeck.rendering.volume import OccupancyGrid, render_rays

torch.set_num_threads(1)

SMALL = {
    "mlp": {"levels": 3, "depth": 3, "width": 16, "hidden": 16},
    "hash": {"levels": 3, "log2_size": 9, "finest": 24, "hidden": 16},
    "voxels": {"resolution": 6},
}


def folded(family: str = "hash", **more: object) -> VolumeField:
    torch.manual_seed(0)
    field = build_field(family, {**SMALL[family], "aabb": FOLDED, **more})
    with torch.no_grad():
        for parameter in field.encoding_parameters():
            parameter.normal_(0, 0.5)
    return field


def directions(n: int) -> torch.Tensor:
    return F.normalize(torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=-1)


def test_the_contraction_by_hand_and_its_inverse():
    d = directions(7)
    sizes = torch.tensor([0.0, 0.3, 1.0, 2.0, 4.0, 1e3, 1e6], dtype=torch.float64)[:, None]
    wanted = torch.tensor([0.0, 0.3, 1.0, 1.5, 1.75, 2 - 1e-3, 2 - 1e-6], dtype=torch.float64)[:, None]
    torch.testing.assert_close(contract(sizes * d), wanted * d)
    torch.testing.assert_close(expand(wanted * d), sizes * d, rtol=1e-6, atol=1e-12)
    assert bool(torch.isfinite(expand(2 * d)).all())


def test_the_slope_of_the_contraction():
    """The Jacobian is 1 within the unit ball; outside 1/r^2 along the radius and (2 - 1/r)/r across it. At the origin it is finite."""
    x = torch.tensor([0.0, 3.0, 0.0], dtype=torch.float64)
    found = torch.autograd.functional.jacobian(contract, x)
    torch.testing.assert_close(found, torch.diag(torch.tensor([5 / 9, 1 / 9, 5 / 9], dtype=torch.float64)))
    for inner in (0.5 * x / 3, 0 * x):
        torch.testing.assert_close(torch.autograd.functional.jacobian(contract, inner), torch.eye(3).double())


@pytest.mark.parametrize("family", list(SMALL))
def test_a_contracted_field_is_the_field_at_contracted_points(family: str, tmp_path: Path):
    inner = folded(family).eval()
    field = ContractedField(inner, (0.5, 0.0, -1.0), 2.0).eval()
    d = directions(40).float()
    x = d * torch.logspace(-2, 2.5, 40)[:, None]
    found, wanted = field(x, d), inner(contract((x - torch.tensor([0.5, 0, -1])) / 2), d)
    for name, value in wanted.items():
        if value is None:
            assert found[name] is None
        else:
            torch.testing.assert_close(found[name], value)
    assert field.feature_width == inner.feature_width
    assert {id(p) for g in field.param_groups(0.1) for p in g["params"]} == {id(p) for p in inner.parameters()}
    field.save(tmp_path)
    again = load_field(tmp_path)
    assert isinstance(again, ContractedField) and again.config() == field.config()
    torch.testing.assert_close(again(x, d)["rgb"], found["rgb"], rtol=0, atol=0)


def test_bins_equal_in_disparity():
    entry, leave = torch.tensor([0.5, 1.0]), torch.tensor([100.0, 8.0])
    t, delta = stratified(entry, leave, 6, spacing="disparity")
    edges = bin_edges(entry, leave, 6, "disparity")
    torch.testing.assert_close((1 / edges).diff(), (1 / leave - 1 / entry)[:, None].expand(2, 6) / 6)
    torch.testing.assert_close(delta, edges.diff())
    torch.testing.assert_close(edges[:, [0, -1]], torch.stack([entry, leave], 1))
    torch.testing.assert_close(1 / t, (1 / edges[:, 1:] + 1 / edges[:, :-1]) / 2)
    jittered, _ = stratified(entry, leave, 6, perturb=True, spacing="disparity")
    assert bool(((jittered >= edges[:, :-1]) & (jittered <= edges[:, 1:])).all())
    plain = bin_edges(entry, leave, 6)
    torch.testing.assert_close(plain.diff(), stratified(entry, leave, 6)[1])
    with pytest.raises(InputError, match="linear or by disparity"):
        stratified(entry, leave, 6, spacing="log")
    with pytest.raises(InputError, match="raise near"):
        stratified(0 * entry, leave, 6, spacing="disparity")


def test_a_thin_shell_near_by_under_a_far_horizon():
    """Of 256 samples up to a distance of 1000 equal ones miss a shell 0.2 thick at a distance of 1; those equal in disparity see it."""

    class Shell(torch.nn.Module):
        aabb = torch.tensor([[-1e4] * 3, [1e4] * 3])

        def density(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            size = x.norm(dim=-1)
            return {"sigma": 20.0 * ((size > 1) & (size < 1.2))}

        def forward(self, x: torch.Tensor, d: torch.Tensor) -> dict[str, torch.Tensor]:
            return {**self.density(x), "rgb": torch.ones_like(x)}

    rays = Rays(torch.zeros(3, 3), directions(3).float())

    def seen(**options: object) -> float:
        return float(render_rays(Shell(), rays, near=0.4, far=1e3, samples=256, **options)["opacity"][0])

    wanted = 1 - math.exp(-20 * 0.2)
    assert seen() < 0.01
    assert seen(spacing="disparity") == pytest.approx(wanted, abs=2e-3)
    assert seen(spacing="disparity", fine=64) == pytest.approx(wanted, abs=2e-3)


def test_skipping_empty_cells_of_contracted_space():
    inner = folded("voxels", density={"low": -30.0, "high": 7.0})
    with torch.no_grad():
        inner.data[:, 0] = torch.where(inner.vertices().norm(dim=-1).flatten() > 1.5, 2.0, -30.0)
    field = ContractedField(inner.eval(), radius=0.5).eval()
    grid = OccupancyGrid(inner.aabb, 24)
    grid.refresh(inner, points=4)
    rays = Rays(torch.zeros(20, 3), directions(20).float())
    options = {"near": 0.05, "far": 400.0, "samples": 64, "spacing": "disparity"}
    dense = render_rays(field, rays, **options)
    skipped = render_rays(field, rays, occupancy=lambda x: grid(field.contracted(x)), **options)
    torch.testing.assert_close(skipped["rgb"], dense["rgb"], atol=0.05, rtol=0)
    assert float(dense["opacity"].detach().min()) > 0.9 and int(skipped["evaluated"]) < 0.8 * int(dense["evaluated"])


def test_bad_input_is_named():
    with pytest.raises(InputError, match=r"must hold \[-2, 2\]\^3"):
        ContractedField(build_field("voxels", {"resolution": 4}))
    for wrong in ({"radius": 0.0}, {"reach": 1.0}, {"centre": (0.0, 0.0)}):
        with pytest.raises(InputError, match="a contraction has a centre"):
            ContractedField(folded(), **wrong)
    with pytest.raises(InputError, match="cannot be built so"):
        build_field("contracted", {"nonsense": 1})
    np.testing.assert_allclose(FOLDED, [[-2] * 3, [2] * 3])
