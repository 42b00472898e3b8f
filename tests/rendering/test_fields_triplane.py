from __future__ import annotations

import numpy as np
import pytest
import torch

from limbeck.core.errors import InputError
from limbeck.rendering.fields import TriplaneField

torch.set_num_threads(1)


def points(n: int = 30) -> torch.Tensor:
    return torch.rand(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("combine", ["sum", "product"])
def test_planes_by_numpy(combine: str):
    """Every plane interpolated by hand at every point, in a box that is no cube."""
    field, x = TriplaneField(5, 4, combine, aabb=[[-1, -1, -1], [1, 1, 2]]).double(), points(8)
    place = (x.numpy() + 1) / np.array([2, 2, 3]) * 4
    planes = field.planes.detach().numpy()
    for i, p in enumerate(place):
        found = []
        for k, (a, b) in enumerate(((0, 1), (0, 2), (1, 2))):
            rows = np.array([[np.interp(p[a], np.arange(5), row) for row in channel] for channel in planes[k]])
            found.append([np.interp(p[b], np.arange(5), row) for row in rows])
        wanted = np.sum(found, 0) if combine == "sum" else np.prod(found, 0)
        np.testing.assert_allclose(field.encode(x[i : i + 1])[0].detach(), wanted, rtol=1e-6)


def test_linear_functions_exactly():
    """A sum of planes holds x + y + z, a product of planes x y z."""
    x, steps = points(), torch.linspace(-1, 1, 6, dtype=torch.float64)
    total, product = (TriplaneField(6, 1, combine).double() for combine in ("sum", "product"))
    with torch.no_grad():
        total.planes.zero_()
        total.planes[0, 0] = steps[None, :] + steps[:, None]
        total.planes[1, 0] = steps[:, None]
        product.planes.fill_(1.0)
        product.planes[0, 0] = steps[None, :] * steps[:, None]
        product.planes[2, 0] = steps[:, None]
    torch.testing.assert_close(total.encode(x)[:, 0], x.sum(1))
    torch.testing.assert_close(product.encode(x)[:, 0], x.prod(1))


@pytest.mark.parametrize("combine", ["sum", "product"])
def test_upsampling_keeps_the_field(combine: str):
    field, x = TriplaneField(6, 3, combine).double(), points()
    before = field.encode(x)
    field.upsample(11)
    assert field.resolution == 11 and field.config()["resolution"] == 11
    torch.testing.assert_close(field.encode(x), before)


def test_the_start_and_the_penalty():
    torch.manual_seed(0)
    for combine, centre in (("sum", 0.0), ("product", 1.0)):
        field = TriplaneField(24, 8, combine, init=0.2)
        assert float(field.planes.detach().mean()) == pytest.approx(centre, abs=0.01)
        assert float(field.planes.detach().std()) == pytest.approx(0.2, rel=0.05)
    planes = field.planes.detach().numpy()
    wanted = (np.diff(planes, axis=3) ** 2).mean() + (np.diff(planes, axis=2) ** 2).mean()
    assert float(field.total_variation().detach()) == pytest.approx(wanted, rel=1e-5)


def test_bad_input_is_named():
    for arguments, told in (
        ({"combine": "mean"}, "sum or product"),
        ({"resolution": 1}, "resolution is a whole number of at least 2"),
        ({"features": 0}, "features is a whole number"),
    ):
        with pytest.raises(InputError, match=told):
            TriplaneField(**arguments)
    with pytest.raises(InputError, match="resolution is a whole number"):
        TriplaneField(4).upsample(1)
