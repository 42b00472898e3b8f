from __future__ import annotations

import numpy as np
import pytest
import torch

from limbeck.core.errors import InputError
from limbeck.rendering.fields import VMField

torch.set_num_threads(1)


def points(n: int = 30) -> torch.Tensor:
    return torch.rand(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_products_by_numpy():
    """Planes and lines interpolated by hand at every point."""
    field, x = VMField(5, 2, 3, aabb=[[-1, -1, -1], [1, 1, 2]]).double(), points(8)
    place = (x.numpy() + 1) / np.array([2, 2, 3]) * 4
    planes, lines = field.planes.detach().numpy(), field.lines.detach().numpy()

    def line(values: np.ndarray, at: float) -> np.ndarray:
        return np.stack([np.interp(at, np.arange(5), row) for row in values])

    for i, p in enumerate(place):
        products = []
        for k, (a, b, c) in enumerate(((0, 1, 2), (0, 2, 1), (1, 2, 0))):
            across = np.stack(
                [line(planes[k][:, row], p[a]) for row in range(5)], 1
            )  # along the first axis of the pair
            products.append(line(across, p[b]) * line(lines[k], p[c]))
        wanted = [np.sum([v[:2] for v in products]), *np.concatenate([v[2:] for v in products])]
        np.testing.assert_allclose(field.encode(x[i : i + 1])[0].detach(), wanted, rtol=1e-6)


def linear_field() -> VMField:
    """A field whose raw density is 1 + 2x - 3y + 0.5z in a box."""
    field = VMField(6, 2, 1, aabb=[[-1, -1, -1], [1, 1, 1]]).double()
    steps = torch.linspace(-1, 1, 6, dtype=torch.float64)
    with torch.no_grad():
        field.planes[:, :2].zero_()
        field.lines[:, :2].fill_(1.0)
        field.planes[0, 0] = 1 + 2 * steps[None, :] - 3 * steps[:, None]
        field.planes[1, 1] = 1.0
        field.planes[2, 1] = -1.0
        field.lines[2, 1] = 1.0
        field.planes[1, 0] = 0.5 * steps[:, None]
    return field


def test_a_linear_function_exactly():
    field, x = linear_field(), points()
    raw = field.geometry(field.encode(x))[0]
    torch.testing.assert_close(raw, 1 + 2 * x[:, 0] - 3 * x[:, 1] + 0.5 * x[:, 2])


def test_upsampling_keeps_the_field():
    field, x = VMField(6, 2, 3).double(), points()
    before = field.encode(x)
    field.upsample(11)
    assert field.resolution == 11 and field.config()["resolution"] == 11
    torch.testing.assert_close(field.encode(x), before)
    with pytest.raises(InputError, match="resolution is a whole number of at least 2"):
        field.upsample(1)


def test_shrinking_keeps_the_field_inside():
    field = linear_field()
    box = torch.tensor([[-0.5, -0.2, 0.0], [1.0, 0.4, 0.7]], dtype=torch.float64)
    x = box[0] + (box[1] - box[0]) * (points() + 1) / 2
    before = field.density(x)["log_sigma"]
    field.shrink(box)
    torch.testing.assert_close(field.density(x)["log_sigma"], before)
    assert float(field.density(torch.tensor([[0.9, 0.9, 0.0]], dtype=torch.float64))["sigma"]) == 0
    for wrong in ([[-2, 0, 0], [0, 0.1, 0.1]], [[0, 0, 0], [0, 0.1, 0.1]]):
        with pytest.raises(InputError, match="must lie in the old one"):
            field.shrink(wrong)


def test_penalties_by_numpy():
    field = VMField(5, 2, 3)
    planes, lines = field.planes.detach().numpy(), field.lines.detach().numpy()
    assert float(field.sparsity().detach()) == pytest.approx(np.abs(planes[:, :2]).mean() + np.abs(lines[:, :2]).mean())
    wanted = (np.diff(planes, axis=3) ** 2).mean() + (np.diff(planes, axis=2) ** 2).mean()
    assert float(field.total_variation().detach()) == pytest.approx(wanted)
