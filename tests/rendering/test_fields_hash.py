from __future__ import annotations

import numpy as np
import pytest
import torch

from limbeck.core.errors import InputError
from limbeck.rendering.fields import HashEncoding, HashField

torch.set_num_threads(1)


def test_the_levels():
    encoding = HashEncoding(6, 2, 13, 8, 64)
    growth = np.exp((np.log(64) - np.log(8)) / 5)
    assert encoding.sizes.tolist() == [8, *(int(8 * growth**level) for level in range(1, 5)), 64]
    rows = [min((n + 1) ** 3, 2**13) for n in encoding.sizes.tolist()]
    assert encoding.table.shape == (sum(rows), 2) and encoding.offsets.tolist() == np.cumsum([0, *rows[:-1]]).tolist()
    assert float(encoding.table.abs().max()) <= 1e-4
    assert HashEncoding(1, 2, 13, 16, 16).sizes.tolist() == [16]
    full = HashEncoding(16, 2, 10, 16, 2048)
    assert full.sizes[-1] == 2048 and full.width == 32


def test_rows_against_plain_integers():
    """Every corner of every level by Python's unbounded integers, dense and hashed levels alike."""
    encoding = HashEncoding(4, 2, 9, 5, 300)
    corner = (torch.rand(7, 4, 3) * encoding.sizes[:, None]).long()
    found = encoding.rows(corner)
    assert encoding.dense == 1
    for level, (n, offset) in enumerate(zip(encoding.sizes.tolist(), encoding.offsets.tolist(), strict=True)):
        for i in range(7):
            for j in range(8):
                a, b, c = (int(corner[i, level, k]) + (j >> (2 - k) & 1) for k in range(3))
                if (n + 1) ** 3 <= 2**9:
                    row = a + (n + 1) * (b + (n + 1) * c)
                else:
                    row = (a ^ b * 2654435761 ^ c * 805459861) % 2**9
                assert int(found[i, level, j]) == row + offset
    for level in range(4):
        end = encoding.offsets[level + 1] if level < 3 else len(encoding.table)
        assert int(found[:, level].max()) < end and int(found[:, level].min()) >= encoding.offsets[level]


@pytest.mark.parametrize("smooth", [False, True])
def test_trilinear_interpolation(smooth: bool):
    """A level that holds a linear function of the vertices gives it back exactly; smooth weights have no slope at the vertices."""
    encoding = HashEncoding(2, 1, 12, 4, 8, smooth).double()
    slope = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
    with torch.no_grad():
        for level, n in enumerate((4, 8)):
            steps = torch.arange(n + 1, dtype=torch.float64) / n
            z, y, x = torch.meshgrid(steps, steps, steps, indexing="ij")  # x runs fastest
            vertices = torch.stack([x, y, z], -1).view(-1, 3)
            start = int(encoding.offsets[level])
            encoding.table[start : start + len(vertices), 0] = vertices @ slope + level
    x = torch.rand(30, 3, dtype=torch.float64)
    x[:3] = torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 0.5, 0]])
    x.requires_grad_()
    found = encoding(x)
    if not smooth:
        torch.testing.assert_close(found, (x @ slope)[:, None] + torch.tensor([0.0, 1.0], dtype=torch.float64))
    else:
        place = x.detach() * 4
        low = (place.floor()).clamp(max=3)
        f = place - low
        np.testing.assert_allclose(found[:, 0].detach(), (low + 3 * f**2 - 2 * f**3) / 4 @ slope)
        vertex = torch.tensor([[0.25, 0.5, 0.75]], dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(encoding(vertex).sum(), vertex)
        assert float(gradient.abs().max()) < 1e-12
        return
    (gradient,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(gradient[3:], (2 * slope).expand(27, 3))


def test_coarse_to_fine():
    field = HashField(4, log2_size=9)
    field.encoding.table.data.normal_()
    x = torch.rand(5, 3)
    whole = field.encode(x)
    field.encoding.set_active(2)
    part = field.encode(x)
    assert part[:, :4].equal(whole[:, :4]) and not bool(part[:, 4:].any())
    again = HashField(4, log2_size=9)
    again.load_state_dict(field.state_dict())
    assert again.encode(x).equal(part)
    with pytest.raises(InputError, match="1 to 4 active"):
        field.encoding.set_active(5)


def test_bad_input_is_named():
    for arguments, told in (
        ({"levels": 0}, "levels is a whole number"),
        ({"log2_size": 40}, "log2_size up to 24"),
        ({"base": 32, "finest": 16}, "finest >= base"),
    ):
        with pytest.raises(InputError, match=told):
            HashField(**arguments)
