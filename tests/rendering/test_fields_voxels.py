from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from limbeck.core.errors import InputError
from limbeck.rendering.fields import VoxelField, load_field
from limbeck.rendering.fields.encodings import spherical_harmonics

torch.set_num_threads(1)

LOW = {"low": -20.0}


def points(n: int = 40) -> torch.Tensor:
    return torch.rand(n, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1


def ball(resolution: int = 17) -> VoxelField:
    """Raw density 3 - 12 |x|: dense inside a radius of 0.25, nothing to speak of beyond 0.7."""
    field = VoxelField(resolution, 1, density=LOW)
    with torch.no_grad():
        field.data.normal_(generator=torch.Generator().manual_seed(1))
        field.data[:, 0] = 3 - 12 * field.vertices().norm(dim=-1).flatten()
    return field.eval()


def test_linear_functions_exactly_in_a_box_of_any_shape():
    field = VoxelField(5, 0, aabb=[[-1, -1, -1], [1, 1, 3]], density=LOW).double()
    slopes = torch.tensor([[1.0, 0.2, 0], [-2, 0, 0.4], [0.5, 1, -1]], dtype=torch.float64)
    with torch.no_grad():
        field.data[:, :2] = field.vertices().double().view(-1, 3) @ slopes[:, :2]
    x = points().double()
    x[:2] = torch.tensor([[-1.0, -1, -1], [1, 1, 3]])
    torch.testing.assert_close(field.encode(x)[:, :2], x @ slopes[:, :2])


def test_interpolation_agrees_with_grid_sample():
    field, x = VoxelField(6, 1), points()
    field.data.data.normal_()
    volume = field.data.detach()[field.links].permute(3, 2, 1, 0)[None]  # channels, z, y, x
    wanted = F.grid_sample(volume, x[None, None, None], align_corners=True)[0, :, 0, 0].T
    torch.testing.assert_close(field.encode(x).detach(), wanted)


def test_colours_by_hand():
    field, x = VoxelField(3, 2), points(5)
    d = F.normalize(torch.randn(5, 3), dim=1)
    channels = torch.randn(28)
    field.data.data[:] = channels
    harmonics = spherical_harmonics(d, 2)
    for c in range(3):
        logits = (harmonics * channels[1 + 9 * c : 10 + 9 * c]).sum(1)
        torch.testing.assert_close(field(x, d)["rgb"][:, c].detach(), logits.sigmoid())


def test_pruning_changes_nothing_visible(tmp_path: Path):
    field, x = ball(), points(500)
    d = F.normalize(x, dim=1)
    with torch.no_grad():
        before = field(x, d)
        left = field.prune(0.01)
        after = field(x, d)
    assert 0.05 < left < 0.4 and left == field.filled == len(field.data) / 17**3
    dense = before["sigma"] > 0.01
    assert 5 < int(dense.sum()) < 400
    torch.testing.assert_close(after["sigma"][dense], before["sigma"][dense])
    torch.testing.assert_close(after["rgb"][dense], before["rgb"][dense])
    assert float(after["sigma"][~dense].max()) <= 0.01
    assert float(field.density(torch.full((1, 3), 0.99))["sigma"]) < 1e-8
    field.save(tmp_path)
    again = load_field(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(x, d)["rgb"], after["rgb"], rtol=0, atol=0)
    assert again.filled == left
    assert field.prune(0.01) == left, "pruning again finds the same"


def test_pruned_fields_learn():
    field = ball(9)
    field.prune(0.01)
    field(points(100), F.normalize(points(100), dim=1))["rgb"].sum().backward()
    assert field.data.grad is not None and float(field.data.grad.abs().max()) > 0


def test_upsampling_keeps_the_field():
    field, x = ball(9), points()
    with torch.no_grad():
        before = field.encode(x)
        field.upsample(17)
        torch.testing.assert_close(field.encode(x), before, rtol=1e-4, atol=1e-4)
        assert field.resolution == 17 and field.config()["resolution"] == 17 and field.filled == 1
        field.prune(0.01)
        share = field.filled
        sigma = field.density(x)["sigma"]
        field.upsample(33)
        assert share * 0.8 < field.filled < share * 1.5
        solid = sigma > 0.05
        torch.testing.assert_close(field.density(x)["sigma"][solid], sigma[solid], rtol=1e-3, atol=1e-4)


def test_total_variation_by_numpy():
    field = VoxelField(4, 0)
    field.data.data.normal_()
    values = field.data.detach().numpy()[field.links.numpy()]
    wanted = sum((np.diff(values, axis=axis) ** 2).mean() for axis in range(3))
    assert float(field.total_variation().detach()) == pytest.approx(wanted, rel=1e-5)
    pruned = ball(9)
    pruned.prune(0.01)
    links, data = pruned.links.numpy(), pruned.data.detach().numpy()
    total = 0.0
    for axis in range(3):
        a, b = np.take(links, range(8), axis), np.take(links, range(1, 9), axis)
        both = (a >= 0) & (b >= 0)
        total += ((data[a[both]] - data[b[both]]) ** 2).mean()
    assert float(pruned.total_variation().detach()) == pytest.approx(total, rel=1e-5)


def test_bad_input_is_named():
    with pytest.raises(InputError, match="would never learn"):
        VoxelField(4, init=-3.0)
    with pytest.raises(InputError, match="at least 2"):
        VoxelField(1)
    with pytest.raises(InputError, match=r"prunes nothing.*lower density\.low"):
        VoxelField(4).prune(0.01)
    with pytest.raises(InputError, match="nothing would be left"):
        VoxelField(4, init=-10.0, density=LOW).prune(0.01)
