r"""Fixed-size images of interval decompositions: the template V and its stable members.

.. math:: V_{op, w, \varphi}(M)(x) = op\big(\{\, w(M_i)\, \varphi(M_i)(x) \,\}_i\big)

op takes a family of any size in any order: a sum, a weighted mean, the largest or the k-th largest value. phi maps one interval
summand I to a function on R^n. With the square :math:`R = [x - \delta, x + \delta]` around x (``local``):

- ``linear``: the longest diagonal of :math:`supp(I) \cap R`, divided by :math:`2\delta`;
- ``volume``: the volume of :math:`supp(I) \cap R`, divided by :math:`(2\delta)^n`;
- ``rectangle``: the volume of the largest box in :math:`supp(I) \cap R`, divided by :math:`(2\delta)^n`;
- ``gaussian``, ``exponential``, ``triangle``: :math:`e^{-d^2/2\delta^2}`, :math:`e^{-d/\delta}` and :math:`(1 - d/\delta)_+` of the
  l-infinity distance d from x to the support (to where I is born and to where it has not died, the larger of the two);
- ``landscape``: the largest e with both :math:`x - e` and :math:`x + e` in supp(I): with op the k-th largest, the multiparameter
  persistence landscape.

w(I) is the p-th power of the length of I's longest diagonal bar, clipped to a box (:meth:`IntervalSummands.lengths`). With
``linear``, and p = 0, 1 or infinity (op = max), V is Lipschitz for the bottleneck distance of decompositions; for p = infinity

.. math:: \|V(M) - V(M')\|_\infty \le \min(d_B(M, M'), \delta) / \delta.

All of it is differentiable in the corners and in delta.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from limbeck.blocks.interval_summands import Box, IntervalSummands, largest_by_owner
from limbeck.core.errors import InputError, UnknownNameError

Local = Literal["linear", "volume", "rectangle", "gaussian", "exponential", "triangle", "landscape"]
Op = Callable[[Tensor], Tensor]
"""(S, pixels) -> (pixels,), the same for every order of the rows."""
_AT_ONCE = 1 << 24  # numbers in a working array


def represent(
    summands: IntervalSummands,
    axes: Sequence[Any],
    *,
    bandwidth: float | Tensor,
    local: Local = "linear",
    power: float = 1.0,
    normalise: bool = False,
    op: Op | None = None,
    box: Box | None = None,
) -> Tensor:
    r"""The image of a decomposition on a grid.

    Args:
        summands: all of one degree.
        axes: the grid's coordinates, a rising list of numbers for each of the n parameters.
        bandwidth: delta, > 0, in units of the parameters.
        local: phi.
        power: p >= 0; infinity: the largest value in the place of the weighted sum.
        normalise: divide by the sum of the weights (for p = 0: by the number of summands with a positive length).
        op: takes the place of the sum: (S, pixels) weighted values -> (pixels,).
        box: where lengths are clipped; None: the grid's ends.

    Returns:
        (r_1, …, r_n), the k-th index along the k-th parameter. 0 everywhere if there are no summands.

    Raises:
        InputError: a number of axes other than n, or settings out of range.
        UnknownNameError: no such phi.
    """
    if power < 0 or math.isnan(power):
        raise InputError(f"power must be at least 0 or infinite (got {power})")
    lines = [torch.as_tensor(axis, dtype=summands.births.dtype) for axis in axes]
    if box is None:
        box = (torch.stack([a[0] for a in lines]), torch.stack([a[-1] for a in lines]))
    shape = [len(a) for a in lines]
    if not len(summands):
        return summands.births.new_zeros(shape)
    values = local_values(summands, lines, bandwidth=bandwidth, local=local).flatten(1)
    if math.isinf(power):
        found = values.amax(0) if op is None else op(values)
        return found.reshape(shape)
    lengths = summands.lengths(box)
    positive = lengths > 0
    weights = torch.where(positive, torch.where(positive, lengths, 1.0) ** power, 0.0)
    # for p = 0 a summand without length in the box adds what it has beyond, but is not counted in the mean
    weighted = (weights if power > 0 else torch.ones_like(weights))[:, None] * values
    if op is not None:
        return op(weighted).reshape(shape)
    total = weights.sum()
    found = weighted.sum(0) / torch.where(total > 0, total, 1.0) if normalise else weighted.sum(0)
    return found.reshape(shape)


def kth_largest(k: int) -> Op:
    """The k-th largest value (from 1); 0 where there are fewer than k summands."""
    if k < 1:
        raise InputError(f"k counts from 1 (got {k})")

    def choose(values: Tensor) -> Tensor:
        return values.topk(k, 0).values[-1] if len(values) >= k else values.new_zeros(values.shape[1:])

    return choose


def local_values(
    summands: IntervalSummands, axes: Sequence[Tensor], *, bandwidth: float | Tensor, local: Local = "linear"
) -> Tensor:
    """phi of every summand on a grid: (S, r_1, …, r_n); arguments as in :func:`represent`."""
    if len(axes) != summands.parameters:
        raise InputError(f"{len(axes)} axes for {summands.parameters} parameters: give one for each")
    if local not in get_args(Local):
        raise UnknownNameError("phi", str(local), get_args(Local))
    delta = torch.as_tensor(bandwidth, dtype=summands.births.dtype)
    if not bool(delta > 0):
        raise InputError(f"bandwidth must be above 0 (got {float(delta)})")
    pixels = math.prod(len(a) for a in axes)
    if local in _BY_DISTANCE:
        return _BY_DISTANCE[local](_distances(summands, axes) / delta)
    if local == "volume":
        births, deaths, owner = disjoint_boxes(summands)
    else:
        births, deaths, owner = summands.pairs()
    found = []
    for begin, end in _chunks(owner, len(summands), max(1, _AT_ONCE // max(pixels, 1))):
        first, last = (int(torch.searchsorted(owner, s)) for s in (begin, end))
        part = slice(first, last)
        sides = [_side(births[part, k], deaths[part, k], a, delta, local) for k, a in enumerate(axes)]
        own, count = owner[part] - begin, end - begin
        if local in ("linear", "landscape"):
            merged = _outer(torch.minimum, sides)
            found.append(largest_by_owner(merged, own, count) / (2 * delta if local == "linear" else 1))
            continue
        merged = _outer(torch.mul, sides)
        scale = (2 * delta) ** len(axes)
        if local == "volume":
            found.append(merged.new_zeros((count, *merged.shape[1:])).index_add(0, own, merged) / scale)
        else:
            found.append(largest_by_owner(merged, own, count) / scale)
    return torch.cat(found) if found else births.new_zeros((0, *(len(a) for a in axes)))


_BY_DISTANCE: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": lambda d: torch.exp(-(d**2) / 2),
    "exponential": lambda d: torch.exp(-d),
    "triangle": lambda d: (1 - d).clamp_min(0),
}


def _side(births: Tensor, deaths: Tensor, axis: Tensor, delta: Tensor, local: str) -> Tensor:
    """What one parameter says about each box at each coordinate: (P, r)."""
    if local == "landscape":
        return torch.minimum(axis - births[:, None], deaths[:, None] - axis).clamp_min(0)
    return (torch.minimum(deaths[:, None], axis + delta) - torch.maximum(births[:, None], axis - delta)).clamp_min(0)


def _outer(join: Callable[[Tensor, Tensor], Tensor], sides: Sequence[Tensor]) -> Tensor:
    """(P, r_1), …, (P, r_n) -> (P, r_1, …, r_n)."""
    merged = sides[0]
    for side in sides[1:]:
        merged = join(merged[..., None], side.reshape(len(side), *[1] * (merged.ndim - 1), side.shape[1]))
    return merged


def _chunks(owner: Tensor, count: int, most: int) -> list[tuple[int, int]]:
    """Ranges of summands with about ``most`` boxes each, and never less than one summand."""
    ends = torch.bincount(owner, minlength=count).cumsum(0)
    found, begin = [], 0
    while begin < count:
        before = int(ends[begin - 1]) if begin else 0
        end = max(begin + 1, int(torch.searchsorted(ends, before + most, right=True)))
        found.append((begin, end))
        begin = end
    return found


def _distances(summands: IntervalSummands, axes: Sequence[Tensor]) -> Tensor:
    """(S, r_1, …, r_n) l-infinity distances."""
    sides = []
    for corners, ptr, sign in (
        (summands.births, summands.birth_ptr, 1.0),
        (summands.deaths, summands.death_ptr, -1.0),
    ):
        owner = torch.repeat_interleave(torch.arange(len(summands)), ptr.diff())
        apart = [(sign * (corners[:, k, None] - a)).clamp_min(0) for k, a in enumerate(axes)]
        merged = -_outer(torch.maximum, apart)
        low = merged.new_full((len(summands), *merged.shape[1:]), -torch.inf)
        index = owner.reshape(-1, *[1] * (merged.ndim - 1)).expand_as(merged)
        sides.append(-low.scatter_reduce(0, index, merged, "amax"))
    return torch.maximum(*sides)


def disjoint_boxes(summands: IntervalSummands) -> tuple[Tensor, Tensor, Tensor]:
    """Every summand's support as boxes without common interior: lower corners (K, n), upper corners (K, n), owner (K,).

    The first n - 1 parameters are cut at all corners of the summand; over each cell the support is one interval of the last
    parameter, from the lowest birth corner below the cell to the highest death corner above it. (Corners of a summand to the power
    n - 1 cells: meant for few parameters.)
    """
    lows, highs, owners = [], [], []
    for number in range(len(summands)):
        births, deaths = summands.corners(number)
        cuts = [torch.cat([births[:, k], deaths[:, k]]).sort().values for k in range(summands.parameters - 1)]
        low, high = _products([c[:-1] for c in cuts], births), _products([c[1:] for c in cuts], births)
        born = (births[:, None, :-1] <= low).all(-1)
        alive = (deaths[:, None, :-1] >= high).all(-1)
        bottom = torch.where(born, births[:, None, -1], torch.inf).amin(0)
        top = torch.where(alive, deaths[:, None, -1], -torch.inf).amax(0)
        kept = top > bottom
        lows.append(torch.cat([low, bottom[:, None]], 1)[kept])
        highs.append(torch.cat([high, top[:, None]], 1)[kept])
        owners.append(torch.full((int(kept.sum()),), number))
    if not lows:
        none = summands.births.new_zeros((0, summands.parameters))
        return none, none, torch.zeros(0, dtype=torch.int64)
    return torch.cat(lows), torch.cat(highs), torch.cat(owners)


def _products(axes: Sequence[Tensor], like: Tensor) -> Tensor:
    """All tuples of one coordinate from each axis: (product of lengths, number of axes)."""
    if not axes:
        return like.new_zeros((1, 0))
    return torch.cartesian_prod(*axes).reshape(-1, len(axes))
