r"""How far apart two candidate decompositions of persistence modules are.

Two interval summands I, J (:class:`~limbeck.blocks.interval_summands.IntervalSummands`) are e-interleaved if each one's birth
corners are, up to e, above a birth corner of the other, and each one's death corners below a death corner of the other:

.. math:: e(I, J) = \max\Big(\max_{b \in B_I} \min_{b' \in B_J} \max_k (b'_k - b_k)_+,\; \text{the same with } I, J \text{ exchanged, and for deaths}\Big),

and both are :math:`w/2` from 0. Their distance is taken as :math:`\min(e(I, J), \max(w_I, w_J)/2)`: exact for boxes, for others from
above. The bottleneck distance of decompositions is the least e at which a partial matching moves no summand farther than e and
leaves only summands of :math:`w \le 2e` alone. In one parameter it is the bottleneck distance of barcodes.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limbeck.blocks.interval_summands import Box, IntervalSummands
from limbeck.core.errors import InputError

Floats = NDArray[np.float64]


def bottleneck_distance(first: IntervalSummands, second: IntervalSummands, box: Box | None = None) -> float:
    """The bottleneck distance of two decompositions, degree by degree; the largest over the degrees.

    Args:
        first, second: over the same parameters.
        box: both are clipped to it first; without it summands that never die can only be matched with such ones.

    Returns:
        a number from 0; infinite where summands of infinite length are left alone.

    Raises:
        InputError: other numbers of parameters.
    """
    if first.parameters != second.parameters:
        raise InputError(f"decompositions over {first.parameters} and {second.parameters} parameters have no distance")
    if box is not None:
        first, second = first.clipped(box), second.clipped(box)
    degrees = torch.cat([first.degrees, second.degrees]).unique().tolist()
    return max((_one_degree(first.of_degree(d), second.of_degree(d)) for d in degrees), default=0.0)


def _one_degree(first: IntervalSummands, second: IntervalSummands) -> float:
    alone = [half.lengths().detach().numpy() / 2 for half in (first, second)]
    cost = summand_distances(first, second)
    levels = np.unique(np.concatenate([[0.0], cost.ravel(), *alone]))
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        if _possible(cost, alone[0], alone[1], levels[middle]):
            high = middle
        else:
            low = middle + 1
    return float(levels[low])


def summand_distances(first: IntervalSummands, second: IntervalSummands) -> Floats:
    """The distance of every summand of ``first`` to every one of ``second``, (S, T)."""
    if not len(first) or not len(second):
        return np.zeros((len(first), len(second)))
    sides = [
        _shift(first.births, first.birth_ptr, second.births, second.birth_ptr),
        _shift(second.births, second.birth_ptr, first.births, first.birth_ptr).T,
        _shift(-first.deaths, first.death_ptr, -second.deaths, second.death_ptr),
        _shift(-second.deaths, second.death_ptr, -first.deaths, first.death_ptr).T,
    ]
    lengths = np.maximum(first.lengths().detach().numpy()[:, None], second.lengths().detach().numpy()[None])
    found: Floats = np.minimum(np.maximum.reduce(sides), lengths / 2)
    return found


def _shift(corners: Tensor, ptr: Tensor, others: Tensor, other_ptr: Tensor) -> Floats:
    """(S, T): how far the up-set of each of ``others`` must be lowered to hold the corners of each summand."""
    here, there = corners.detach().numpy(), others.detach().numpy()
    with np.errstate(invalid="ignore"):
        apart = np.nan_to_num(
            there[None] - here[:, None], nan=0.0, posinf=np.inf, neginf=-np.inf
        )  # inf - inf: the same
    above = np.maximum(apart, 0).max(2)
    nearest = np.minimum.reduceat(above, other_ptr[:-1].numpy(), axis=1)
    found: Floats = np.maximum.reduceat(nearest, ptr[:-1].numpy(), axis=0)
    return found


def _possible(cost: Floats, first: Floats, second: Floats, level: float) -> bool:
    """Whether all summands longer than twice the level can be matched within it (Dulmage and Mendelsohn: one side at a time)."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import maximum_bipartite_matching

    for table, alone in ((cost, first), (cost.T, second)):
        must = alone > level
        if not must.any():
            continue
        if not table.shape[1]:
            return False
        matched = maximum_bipartite_matching(csr_matrix(table[must] <= level), perm_type="column")
        if (matched < 0).any():
            return False
    return True
