"""The residual MLP that denoises: shapes, classes, its limits, what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from limbeck.core.errors import InputError
from limbeck.networks.diffusion_mlp import DiffusionMLP, named_mlp

torch.set_num_threads(1)


def network(**options: object) -> DiffusionMLP:
    torch.manual_seed(0)
    made = DiffusionMLP((2,), width=8, blocks=1, num_classes=3, **options)  # type: ignore[arg-type]
    torch.nn.init.normal_(made.last.weight)
    torch.nn.init.normal_(made.skip.weight)
    return made.double()


def test_it_computes_what_it_says() -> None:
    made = network()
    x, t, c = torch.randn(4, 2).double(), torch.tensor([0.0, 250.0, 500.0, 1000.0]).double(), torch.tensor([0, 1, 2, 3])
    frequencies = 64 ** (torch.arange(16).double() / 15)
    angles = t[:, None] / 1000 * frequencies
    vector = made.time(torch.cat([angles.sin(), angles.cos()], 1)) + made.classes.weight[c]
    vector = F.silu(vector)
    h = made.first(x)
    block = made.blocks[0]
    scale, shift = block.modulation(vector).chunk(2, 1)
    normed = (h - h.mean(1, keepdim=True)) / (h.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    h = h + block.outer(F.silu(block.inner(normed * (1 + scale) + shift)))
    wanted = made.last(F.silu(made.norm(h))) + made.skip(vector) * x
    assert torch.allclose(made(x, t, c), wanted, atol=1e-5)


def test_no_condition_is_the_null_class() -> None:
    made = network()
    x, t = torch.randn(4, 2).double(), torch.rand(4).double()
    assert torch.equal(made(x, t), made(x, t, torch.full((4,), 3)))
    assert not torch.allclose(made(x, t), made(x, t, torch.zeros(4, dtype=torch.long)))


def test_it_begins_at_zero() -> None:
    made = DiffusionMLP((1, 4, 4), width=8, blocks=2)
    assert not bool(made(torch.randn(3, 1, 4, 4), torch.rand(3)).any())


def test_it_tells_times_of_both_kinds_apart() -> None:
    for scale, times in ((1e-3, (100.0, 110.0)), (1.0, (math.log(0.02) / 4, math.log(0.03) / 4))):
        made = network(time_scale=scale)
        x = torch.randn(1, 2).double()
        first, second = (made(x, torch.tensor([t]).double()) for t in times)
        assert float((first - second).abs().max()) > 1e-3


def test_names() -> None:
    made = named_mlp("mlp-w24-b2", (1, 8, 8), 10, 1e-3)
    assert made is not None and made.spec["width"] == 24 and len(made.blocks) == 2
    assert named_mlp("unet-w8", (1, 8, 8), 10, 1e-3) is None


def test_mistakes() -> None:
    made = network()
    x, t = torch.randn(2, 2).double(), torch.rand(2).double()
    with pytest.raises(InputError, match="class 4 was never seen"):
        made(x, t, torch.tensor([0, 4]))
    with pytest.raises(InputError, match="class -1 was never seen"):
        made(x, t, torch.tensor([0, -1]))
    with pytest.raises(InputError, match="class ids"):
        made(x, t, torch.rand(2))
    with pytest.raises(InputError, match=r"shape \(2,\), not \(3,\)"):
        made(torch.randn(2, 3).double(), t)
    with pytest.raises(InputError, match="unconditional"):
        DiffusionMLP((2,), width=4, blocks=1)(torch.randn(2, 2), torch.rand(2), torch.tensor([0, 1]))
    with pytest.raises(InputError, match="at least 1"):
        DiffusionMLP((2,), width=0)
