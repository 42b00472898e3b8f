"""Quantised weights: bucketed affine scaling, uniform and learned levels, rounding, and the gradients through them.

A tensor is flattened and cut into consecutive buckets of k numbers (the last is filled up with its last number, so that its range stays). In
each bucket ``v = (w - beta) / alpha`` lies in [0, 1], with ``beta = min`` and ``alpha = max - min`` (1 where that is below 1e-10). A table of s
levels ``p`` in that scaled space quantises it: ``w_q = alpha * p[c] + beta`` with codes c, the index of the nearest level.

Source: "Model compression via distillation and quantization" (2018). Its code also scales by the largest magnitude or the norm with the sign kept
apart, subtracts means and clips; none of its results use them, and they are left out. It keeps fixed weights sorted, to look only at those near a moved
midpoint when levels are learned; here all are looked up by bisection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from limbeck.core.errors import InputError

SMALLEST_WIDTH = 1e-10
MOST_LEVELS = 256
"""A code is one byte."""
Gradient = Literal["straight-through", "scaling", "truncated"]


class Scaling(NamedTuple):
    """Offset (beta) and width (alpha) of every bucket, (M, 1) each."""

    offset: Tensor
    width: Tensor


@dataclass(frozen=True)
class QuantisedTensor:
    """A tensor as it is stored.

    Attributes:
        codes: (n,) uint8, indices of levels.
        offset, width: (M,) of the buckets.
        levels: (s,) increasing, in scaled space.
        uniform: the levels are 0, 1/(s - 1), …, 1, and need not be stored.
        shape: of the tensor.
        bucket: numbers in a bucket; None: all.
    """

    codes: Tensor
    offset: Tensor
    width: Tensor
    levels: Tensor
    uniform: bool
    shape: tuple[int, ...]
    bucket: int | None

    def restored(self) -> Tensor:
        """The tensor with its quantised values, bit for bit those of :func:`quantise`."""
        rows = to_buckets(self.codes, self.bucket).long()
        scaling = Scaling(self.offset[:, None], self.width[:, None])
        return from_buckets(_place(self.levels[rows], scaling), self.shape)


def bucket_length(numbers: int, bucket: int | None) -> int:
    """Numbers in a bucket: a tensor smaller than one is a bucket of its own."""
    return numbers if bucket is None else min(bucket, numbers)


def to_buckets(tensor: Tensor, bucket: int | None) -> Tensor:
    """(M, k) consecutive buckets of the flattened tensor, the last one filled up with its last number."""
    flat = tensor.reshape(-1)
    length = bucket_length(flat.numel(), bucket)
    missing = -flat.numel() % length
    if missing:
        flat = torch.cat([flat, flat[-1:].expand(missing)])
    return flat.view(-1, length)


def from_buckets(rows: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """The tensor again, without what filled the last bucket up."""
    return rows.reshape(-1)[: torch.Size(shape).numel()].view(shape)


def scaled(rows: Tensor) -> tuple[Tensor, Scaling]:
    """Buckets (M, k) in [0, 1], and how to come back."""
    low, high = torch.aminmax(rows, dim=1, keepdim=True)
    width = high - low
    width = torch.where(width < SMALLEST_WIDTH, torch.ones_like(width), width)
    return (rows - low) / width, Scaling(low, width)


def uniform_levels(count: int, like: Tensor | None = None) -> Tensor:
    """0, 1/(s - 1), …, 1.

    Raises:
        InputError: fewer than 2 levels, or more than a byte can name.
    """
    if not 2 <= count <= MOST_LEVELS:
        raise InputError(f"a tensor has between 2 and {MOST_LEVELS} levels (1 to 8 bits), not {count}")
    return torch.arange(count, dtype=torch.float32, device=None if like is None else like.device) / (count - 1)


def quantile_levels(weight: Tensor, count: int, bucket: int | None) -> Tensor:
    """(s,) quantiles of the scaled weights at equal distances from 0 to 1, so that the levels are used about equally often."""
    uniform_levels(count)
    v, _ = scaled(to_buckets(weight.detach().float(), bucket))
    values = v.reshape(-1)[: weight.numel()].sort().values
    at = torch.linspace(0, len(values) - 1, count, device=values.device, dtype=torch.float64)
    below, above = at.floor().long(), at.ceil().long()
    return torch.lerp(values[below], values[above], (at - below).float())


def uniform_steps(v: Tensor, count: int, stochastic: bool = False) -> Tensor:
    """Codes, as floats, of the nearest of ``count`` equally spaced levels; or of one of the two neighbours, at random and right on average."""
    steps = v * (count - 1)
    steps = (steps + torch.rand_like(steps)).floor_() if stochastic else steps.round_()
    return steps.clamp_(0, count - 1)


def nearest_codes(v: Tensor, levels: Tensor) -> Tensor:
    """Codes of the nearest level, by the midpoints of increasing levels."""
    return torch.bucketize(v, (levels[1:] + levels[:-1]) / 2)


def encode(
    weight: Tensor, levels: Tensor | int, bucket: int | None, gradient: Gradient = "straight-through"
) -> QuantisedTensor:
    """A tensor as it is stored.

    Args:
        weight: any shape.
        levels: (s,) of a codebook, or the number of uniform levels.
        bucket: numbers in a bucket; None: all.
        gradient: ``truncated`` also clamps the weight to [-1, 1].
    """
    with torch.no_grad():
        table, codes, scaling = _assign(_fitted(weight, gradient), levels, bucket, False)
    flat = codes.reshape(-1)[: weight.numel()].to(torch.uint8)
    return QuantisedTensor(
        flat, scaling.offset[:, 0], scaling.width[:, 0], table, isinstance(levels, int), tuple(weight.shape), bucket
    )


def quantise(
    weight: Tensor,
    levels: Tensor | int,
    bucket: int | None = None,
    *,
    stochastic: bool = False,
    gradient: Gradient = "straight-through",
) -> Tensor:
    """The weight with quantised values, of its own shape and type; computed in float32.

    The gradient g at ``w_q`` goes to the weight as ``gradient`` says, and to the levels as ``dL/dp_j``, the sum of ``alpha * g`` over the numbers
    with code j (the codes are not differentiated).

    Args:
        weight: any shape.
        levels: (s,) of a codebook in scaled space, or the number of uniform levels.
        bucket: numbers in a bucket; None: all.
        stochastic: round at random, without bias (uniform levels).
        gradient: ``straight-through``, g itself; ``scaling``, also what the bucket's range gets:
            ``g + (at its maximum - at its minimum) * sum_bucket g * (p[c] - v)``; ``truncated``, weights are clamped to [-1, 1] and those outside
            get no gradient.
    """
    table = levels if isinstance(levels, Tensor) else None
    out: Tensor = _Quantise.apply(weight, table, levels, bucket, stochastic, gradient)
    return out


def _fitted(weight: Tensor, gradient: Gradient) -> Tensor:
    weight = weight.float()
    return weight.clamp(-1, 1) if gradient == "truncated" else weight


def _assign(
    weight: Tensor, levels: Tensor | int, bucket: int | None, stochastic: bool
) -> tuple[Tensor, Tensor, Scaling]:
    """The increasing table, codes (M, k) (floats of uniform levels), scaling."""
    v, scaling = scaled(to_buckets(weight, bucket))
    if isinstance(levels, int):
        return uniform_levels(levels, weight), uniform_steps(v, levels, stochastic), scaling
    table = levels.detach().float().sort().values
    return table, nearest_codes(v, table), scaling


def _place(values: Tensor, scaling: Scaling) -> Tensor:
    return scaling.width * values + scaling.offset


class _Quantise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        table: Tensor | None,
        levels: Tensor | int,
        bucket: int | None,
        stochastic: bool,
        gradient: Gradient,
    ) -> Tensor:
        fitted = _fitted(weight, gradient)
        used, codes, scaling = _assign(fitted, levels, bucket, stochastic)
        values = codes / (levels - 1) if isinstance(levels, int) else used[codes]
        ctx.bucket, ctx.gradient = bucket, gradient
        whole = gradient == "scaling"
        ctx.save_for_backward(
            weight if gradient != "straight-through" else None,
            codes if table is not None else None,
            values if whole else None,
            scaling.offset if whole else None,
            scaling.width if whole or table is not None else None,
            table,
        )
        return from_buckets(_place(values, scaling), weight.shape).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad = grads[0]
        weight, codes, values, offset, width, table = ctx.saved_tensors
        to_weight = to_table = None
        if ctx.needs_input_grad[0]:
            to_weight = grad
            if ctx.gradient == "truncated":
                to_weight = grad * (weight.abs() <= 1)
            elif ctx.gradient == "scaling":
                original, rows = to_buckets(weight.float(), ctx.bucket), _zero_filled(grad, values)
                shift = (rows * (values - (original - offset) / width)).sum(1, keepdim=True)
                ends = torch.zeros_like(rows)
                flat = width > SMALLEST_WIDTH  # a constant bucket has a fixed width
                flat &= original.amax(1, keepdim=True) > original.amin(1, keepdim=True)
                ends.scatter_add_(1, original.argmax(1, keepdim=True), shift * flat)
                ends.scatter_add_(1, original.argmin(1, keepdim=True), -shift * flat)
                to_weight = (grad + from_buckets(ends, weight.shape)).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            order, rows = table.argsort(), _zero_filled(grad, codes)  # codes are of the sorted table
            summed = torch.bincount(codes.reshape(-1), (width * rows).reshape(-1), minlength=len(table))
            to_table = torch.zeros_like(table).index_copy_(0, order, summed.to(table.dtype))
        return to_weight, to_table, None, None, None, None


def _zero_filled(grad: Tensor, like: Tensor) -> Tensor:
    """Gradients in buckets (M, k); what fills the last one up has none."""
    missing = like.numel() - grad.numel()
    flat = grad.float().reshape(-1)
    return (torch.cat([flat, flat.new_zeros(missing)]) if missing else flat).view(like.shape)
