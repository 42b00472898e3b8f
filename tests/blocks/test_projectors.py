from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limbeck.blocks.projectors import Projector, make_projector
from limbeck.core.errors import InputError


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("student", "teacher", "options"),
    [
        ((1, 8), (1, 5), {}),
        ((1, 8), (1, 5), {"hidden": 3}),
        ((1, 8, 4, 4), (1, 5, 4, 4), {}),
        ((1, 8, 4, 4), (1, 5, 4, 4), {"hidden": 3}),
        ((1, 8, 4, 6), (1, 5, 2, 3), {}),
        ((1, 8, 4, 4), (1, 5, 7, 7), {"batch_norm": False}),
        ((1, 8, 4, 4), (1, 5, 2, 7), {}),
        ((1, 9, 8), (1, 9, 5), {}),
        ((1, 7, 8), (1, 7, 5), {"hidden": 3}),
        ((1, 16, 8), (1, 9, 5), {}),
        ((1, 17, 8), (1, 10, 5), {"prefix_tokens": (1, 1)}),
        ((1, 18, 8), (1, 9, 5), {"prefix_tokens": (2, 0)}),
        ((1, 11, 8), (1, 9, 5), {"prefix_tokens": (2, 0)}),
        ((1, 6, 8), (1, 24, 5), {"grid": ((2, 3), (4, 6))}),
        ((1, 6, 8), (1, 9, 5), {"grid": (2, 3)}),
        ((1, 6, 8), (1, 11, 5), {"grid": ((1, 6), (1, 11))}),
        ((1, 8, 4, 4), (1, 9, 5), {}),
        ((1, 8, 4, 4), (1, 6, 5), {"grid": (2, 3)}),
        ((1, 17, 8), (1, 5, 3, 3), {"prefix_tokens": (1, 0)}),
        ((1, 6, 8), (1, 5, 2, 3), {"grid": (2, 3)}),
        ((1, 8, 4, 4), (1, 5), {}),
        ((1, 17, 8), (1, 5), {"prefix_tokens": (1, 0)}),
        ((1, 7, 8), (1, 5), {}),
        ((1, 8, 4, 4), (1, 8, 2, 2), {"identity_if_equal": True}),
    ],
)
def test_shapes_and_gradients(student: tuple[int, ...], teacher: tuple[int, ...], options: dict[str, Any]) -> None:
    projector = make_projector(student, teacher, **options)
    assert isinstance(projector, Projector)
    x = torch.randn(3, *student[1:], requires_grad=True)
    out = projector(x)
    assert out.shape == (3, *teacher[1:])
    out.square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(p.grad is not None for p in projector.parameters())


def test_vectors_are_linear() -> None:
    projector, x = make_projector((2, 4), (2, 3)), torch.randn(5, 4)
    assert isinstance(projector.project, nn.Linear)
    torch.testing.assert_close(projector(x), x @ projector.project.weight.T)
    hidden = make_projector((2, 4), (2, 3), hidden=6)
    first, _, last = hidden.project
    torch.testing.assert_close(hidden(x), F.gelu(x @ first.weight.T) @ last.weight.T)


def test_map_is_projected_then_pooled() -> None:
    projector, x = make_projector((1, 4, 4, 4), (1, 3, 2, 2), batch_norm=False), torch.randn(2, 4, 4, 4)
    projected = torch.einsum("oi,bihw->bohw", projector.project.weight[:, :, 0, 0], x)
    expected = projected.reshape(2, 3, 2, 2, 2, 2).mean(dim=(3, 5))
    torch.testing.assert_close(projector(x), expected)


def test_map_grows_bilinearly_and_axes_are_separate() -> None:
    same = {"identity_if_equal": True}
    ramp = torch.tensor([[[[0.0, 4.0]]]])
    grown = make_projector((1, 1, 1, 2), (1, 1, 1, 4), **same)(ramp)
    torch.testing.assert_close(grown, torch.tensor([[[[0.0, 1.0, 3.0, 4.0]]]]))
    x = torch.tensor([[[[0.0, 4.0], [2.0, 6.0]]]])  # height shrinks to its mean, width grows
    torch.testing.assert_close(
        make_projector((1, 1, 2, 2), (1, 1, 1, 4), **same)(x), torch.tensor([[[[1.0, 2.0, 4.0, 5.0]]]])
    )


def test_batch_norm_normalises_and_maps_of_other_sizes_work() -> None:
    projector = make_projector((1, 4, 4, 4), (1, 3, 6, 6))
    conv, norm = projector.project
    assert conv.bias is None and isinstance(norm, nn.BatchNorm2d)
    x = torch.randn(16, 4, 6, 6) * 7 + 2
    out = projector(x)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var((0, 2, 3), unbiased=False), torch.ones(3), atol=1e-3, rtol=0)
    assert projector(torch.randn(2, 4, 9, 5)).shape == (2, 3, 6, 6)


def test_prefix_tokens_are_kept_apart() -> None:
    options = {"identity_if_equal": True, "prefix_tokens": (1, 1)}
    x = torch.arange(16.0).reshape(1, 16, 1)
    x = torch.cat([torch.full((1, 1, 1), 100.0), x], dim=1)
    out = make_projector((1, 17, 1), (1, 5, 1), **options)(x)
    # 2x2 means of the 4x4 grid 0..15, rows first
    torch.testing.assert_close(out[0, :, 0], torch.tensor([100.0, 2.5, 4.5, 10.5, 12.5]))
    dropped = make_projector((1, 17, 1), (1, 4, 1), identity_if_equal=True, prefix_tokens=(1, 0))(x)
    torch.testing.assert_close(dropped, out[:, 1:])
    same_count = make_projector((1, 17, 1), (1, 16, 1), identity_if_equal=True, prefix_tokens=(1, 0))(x)
    assert torch.equal(same_count, x[:, 1:])
    kept = make_projector((1, 17, 1), (1, 17, 1), **options)(x)
    assert torch.equal(kept, x)


def test_map_and_tokens_are_the_same_grid_rows_first() -> None:
    x = torch.randn(2, 3, 4, 4)
    tokens = make_projector((1, 3, 4, 4), (1, 16, 3), identity_if_equal=True)(x)
    assert torch.equal(tokens[:, 5], x[:, :, 1, 1]) and torch.equal(tokens[:, 3], x[:, :, 0, 3])
    back = make_projector((1, 16, 3), (1, 3, 4, 4), identity_if_equal=True)(tokens)
    assert torch.equal(back, x)
    wide = make_projector((1, 16, 3), (1, 3, 2, 8), identity_if_equal=True, grid=(2, 8))(tokens)
    assert torch.equal(wide, tokens.transpose(1, 2).reshape(2, 3, 2, 8))


def test_pooling_to_a_vector() -> None:
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(make_projector((1, 3, 4, 4), (1, 3), identity_if_equal=True)(x), x.mean((2, 3)))
    tokens = torch.randn(2, 5, 3)
    pooled = make_projector((1, 5, 3), (1, 3), identity_if_equal=True, prefix_tokens=(1, 0))(tokens)
    torch.testing.assert_close(pooled, tokens[:, 1:].mean(1))


def test_identity_only_when_asked_and_equal() -> None:
    assert isinstance(make_projector((1, 4), (1, 4)).project, nn.Linear)
    equal = make_projector((1, 4), (1, 4), identity_if_equal=True)
    assert not list(equal.parameters())
    x = torch.randn(2, 4)
    assert equal(x) is x
    assert isinstance(make_projector((1, 4), (1, 5), identity_if_equal=True).project, nn.Linear)
    assert len(make_projector((1, 4), (1, 4), identity_if_equal=True, hidden=2).project) == 3


def test_initial_weights_and_biases() -> None:
    linear = make_projector((1, 200), (1, 300)).project
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05) and not linear.bias.any()
    conv = make_projector((1, 200, 2, 2), (1, 300, 2, 2), batch_norm=False).project
    assert conv.weight.std().item() == pytest.approx(200**-0.5, rel=0.05) and not conv.bias.any()
    assert make_projector((1, 4), (1, 3), bias=False).project.bias is None
    assert make_projector((1, 4, 1, 1), (1, 3, 1, 1), bias=False, batch_norm=False).project.bias is None
    assert make_projector((1, 4, 1, 1), (1, 3, 1, 1), bias=True).project[0].bias is not None
    torch.manual_seed(5)
    first = make_projector((1, 4), (1, 3)).project.weight
    torch.manual_seed(5)
    assert torch.equal(make_projector((1, 4), (1, 3)).project.weight, first)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        ((1, 8), (1, 5, 4, 4), {}, r"a vector \(B, 8\) has no places to fill the teacher's map \(B, 5, 4, 4\)"),
        ((1, 8), (1, 9, 5), {}, "the teacher's tokens"),
        ((1, 17, 8), (1, 9, 5), {}, "the student's 17 tokens form no square: give grid"),
        ((1, 8, 4, 4), (1, 10, 5), {}, "the teacher's 10 tokens form no square"),
        (
            (1, 16, 8),
            (1, 10, 5),
            {"prefix_tokens": (0, 1)},
            r"teacher has 1 prefix tokens and the student 0.*y\[:, 1:\]",
        ),
        ((1, 18, 8), (1, 10, 5), {"prefix_tokens": (2, 1)}, "must be equal in number"),
        ((1, 8, 4, 4), (1, 9, 5), {"prefix_tokens": (1, 0)}, "student's map .* has no prefix tokens"),
        ((1, 4, 8), (1, 9, 5), {"prefix_tokens": (4, 0)}, "4 of them cannot be prefix tokens"),
        ((1, 6, 8), (1, 9, 5), {"grid": (2, 4)}, "grid 2x4 fits no token count: the student has 6, the teacher has 9"),
        ((1, 6, 8), (1, 9, 5), {"grid": ((2, 3), (2, 4))}, "grid 2x4 does not fit: the teacher has 9"),
        ((1, 6, 8), (1, 9, 5), {"grid": ((2, 3), 4)}, "two such pairs"),
        ((1, 8), (1, 5), {"grid": (2, 3)}, "neither feature has tokens"),
        ((8,), (1, 5), {}, r"the student's feature .* is neither"),
        ((1, 8), (1, 5, 2, 2, 2), {}, r"the teacher's feature \(B, 5, 2, 2, 2\) is neither"),
        ((1, 0), (1, 5), {}, "is neither"),
        ((1, 8), (1, 5), {"hidden": 0}, "hidden must be at least 1"),
    ],
)
def test_refused(student: tuple[int, ...], teacher: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_projector(student, teacher, **options)


def test_input_of_another_shape() -> None:
    projector = make_projector((1, 16, 8), (1, 9, 5))
    with pytest.raises(InputError, match=r"takes \(B, 16, 8\), got \(B, 16, 7\)"):
        projector(torch.randn(2, 16, 7))
    with pytest.raises(InputError, match="got"):
        projector(torch.randn(2, 8))
    with pytest.raises(InputError, match="takes 16 tokens and 0 prefix tokens, got 17"):
        projector(torch.randn(2, 17, 8))
    assert "(B, 16, 8) -> (B, 9, 5)" in repr(projector)
