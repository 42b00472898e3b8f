"""Subsets of real samples: how many of each class, at random, by greedy k-centre, by herding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from limbeck.core.errors import InputError

HerdingRule = Literal["mean", "welling"]


def apportion(shares: Tensor, total: int, generator: torch.Generator | None = None) -> Tensor:
    """Whole numbers near ``total`` times each share, with exactly that sum.

    Each is rounded down or up; which are rounded up is drawn so that the expected number is exact (systematic sampling in a random
    order). With equal shares below one each, that is a uniformly random subset.

    Args:
        shares: (K,) non-negative weights, not all zero.
        total: the sum wanted.
        generator: on the CPU; None: torch's global one.

    Returns:
        (K,) int64.

    Raises:
        InputError: negative shares or a negative total; all shares zero but not the total.
    """
    if total < 0 or bool((shares < 0).any()):
        raise InputError("shares and their total must not be negative")
    whole = shares.double().sum()
    if whole == 0:
        if total:
            raise InputError(f"{total} cannot be divided among shares that are all zero")
        return torch.zeros(len(shares), dtype=torch.long)
    exact = shares.double() * total / whole
    exact = torch.where((exact - exact.round()).abs() < 1e-9, exact.round(), exact)
    counts = exact.floor()
    left = int(total - counts.sum())
    if left:
        order = torch.randperm(len(shares), generator=generator)
        ends = (exact - counts)[order].cumsum(0)
        ends *= left / ends[-1]  # rounding aside, they end at ``left`` already
        start = torch.rand((), generator=generator, dtype=torch.float64)
        # One pointer at start, start + 1, …; an interval that holds one is rounded up. All are shorter than 1.
        passed = (ends - start).ceil().clamp(0, left)
        counts[order] += passed.diff(prepend=passed.new_zeros(1))
    return counts.long()


def class_counts(
    labels: Tensor,
    *,
    ipc: int | None = None,
    ratio: float | None = None,
    num_classes: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """How many samples of each class a subset gets.

    Args:
        labels: (N,) int64.
        ipc: so many of every class.
        ratio: so large a part of all samples, in (0, 1], divided in proportion to the classes; the sum is ``round(ratio N)``.
        num_classes: C; None: the largest label and one.
        generator: draws which classes are rounded up under ``ratio``.

    Returns:
        (C,) int64.

    Raises:
        InputError: neither or both of ``ipc`` and ``ratio``, values out of range, or a class with fewer than ``ipc`` samples.
    """
    if (ipc is None) == (ratio is None):
        raise InputError("say how many: either ipc (samples of each class) or ratio (part of all samples)")
    sizes = torch.bincount(labels.cpu(), minlength=num_classes or 0)
    if ipc is not None:
        if ipc < 1:
            raise InputError(f"ipc must be at least 1 (got {ipc})")
        short = (sizes < ipc).nonzero().flatten()
        if len(short):
            c = int(short[0])
            raise InputError(f"class {c} has {int(sizes[c])} samples, fewer than the {ipc} asked for: lower ipc")
        return torch.full_like(sizes, ipc)
    assert ratio is not None
    return apportion(sizes, kept_count(len(labels), ratio), generator)


def kept_count(size: int, ratio: float) -> int:
    """``round(ratio · size)``, half rounded up.

    Raises:
        InputError: a ratio outside (0, 1], or one that keeps nothing.
    """
    if not 0 < ratio <= 1:
        raise InputError(f"ratio must be above 0 and at most 1 (got {ratio})")
    count = int(ratio * size + 0.5 + 1e-9)
    if count == 0:
        raise InputError(f"a ratio of {ratio} of {size} samples keeps none: raise it")
    return count


def per_class(labels: Tensor, counts: Tensor, select: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Apply a selection to each class.

    Args:
        labels: (N,) int64.
        counts: (C,) how many of each.
        select: (ids of one class (n,), how many) -> positions among them (k,).

    Returns:
        (Σ counts,) ids, class by class, each in its order of selection.
    """
    parts = []
    for c, count in enumerate(counts.tolist()):
        if count:
            members = (labels == c).nonzero().flatten()
            parts.append(members[select(members, count).to(members.device)])
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)


def random_selection(labels: Tensor, counts: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Ids (Σ counts,) drawn uniformly from each class without replacement, ascending.

    Args:
        labels: (N,) int64.
        counts: (C,) how many of each class.
        generator: on the CPU; None: torch's global one.

    Raises:
        InputError: more asked of a class than it has.
    """
    labels = labels.cpu()
    sizes = torch.bincount(labels, minlength=len(counts))
    short = (sizes[: len(counts)] < counts).nonzero().flatten()
    if len(short) or len(sizes) > len(counts):
        where = f"class {int(short[0])} has fewer samples than asked for" if len(short) else "a count is lacking"
        raise InputError(f"{where}: class sizes are {sizes.tolist()}, counts {counts.tolist()}")
    order = torch.randperm(len(labels), generator=generator)
    by_class = order[labels[order].argsort(stable=True)]
    rank = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[by_class]]
    return by_class[rank < counts[labels[by_class]]].sort().values


def k_center(features: Tensor, count: int, *, first: int | Literal["medoid"] = "medoid") -> Tensor:
    """Greedy k-centre: each next sample is the one farthest from all chosen ones (a 2-approximation of the smallest covering radius).

    Args:
        features: (n, D); distances are Euclidean.
        count: k <= n. The first k of a longer selection are the selection of k.
        first: where to start: a sample, or ``medoid``: the one nearest to the mean. Our decision: the paper starts from samples that are
            labelled already.

    Returns:
        (k,) int64 positions in order of selection; of equally far ones the first.

    Raises:
        InputError: k out of range, or no such first sample.

    Source: "Active Learning for Convolutional Neural Networks: A Core-Set Approach" (2018), algorithm 1.
    """
    rows = _rows(features, count)
    if first == "medoid":
        start = int((rows - rows.mean(0)).square().sum(1).argmin())
    elif 0 <= first < len(rows):
        start = first
    else:
        raise InputError(f"there is no sample {first} to start from: there are {len(rows)}")
    chosen = torch.empty(count, dtype=torch.long)
    nearest = torch.full((len(rows),), torch.inf, dtype=rows.dtype, device=rows.device)
    for place in range(count):
        chosen[place] = start
        torch.minimum(nearest, (rows - rows[start]).square().sum(1), out=nearest)
        nearest[start] = -1.0  # duplicates of a chosen sample are at distance 0, and may be chosen; itself may not
        start = int(nearest.argmax())
    return chosen


def covering_radius(features: Tensor, chosen: Tensor) -> float:
    """The largest distance from a sample to the nearest chosen one; what k-centre minimises."""
    return float(torch.cdist(features.double(), features[chosen].double()).amin(1).max())


def coverage(points: Tensor, chosen: Tensor, batch_size: int = 4096) -> float:
    """The mean Euclidean distance of ``points`` (M, D) to the nearest of the ``chosen`` (k, D): how far a subset is from data."""
    near = [torch.cdist(part.double(), chosen.double()).amin(1) for part in points.split(batch_size)]
    return float(torch.cat(near).mean())


def herding(features: Tensor, count: int, rule: HerdingRule = "mean") -> Tensor:
    """Herding without replacement: samples whose running mean follows the mean of all.

    With μ the mean of the features φ and w_0 = μ, step t takes

        x_t = argmax_x <w_{t-1}, φ(x)>   (``welling``),   w_t = w_{t-1} + μ - φ(x_t)

    or the x for which the mean of the t chosen comes nearest to μ (``mean``), which is argmax <w_{t-1}, φ(x)> - |φ(x)|² / 2. On rows of
    equal length both are the same.

    Args:
        features: (n, D).
        count: k <= n. The first k of a longer selection are the selection of k.
        rule: see above.

    Returns:
        (k,) int64 positions in order of selection; of equal ones the first.

    Raises:
        InputError: k out of range.

    Sources: "Herding Dynamical Weights to Learn" (2009); "iCaRL: Incremental Classifier and Representation Learning" (2017) for
    ``mean``. Welling's sequence may repeat a sample; a subset may not, so samples are taken once.
    """
    rows = _rows(features, count)
    mean = rows.mean(0)
    weight = mean.clone()
    penalty = rows.square().sum(1) / 2 if rule == "mean" else rows.new_zeros(len(rows))
    chosen = torch.empty(count, dtype=torch.long)
    for place in range(count):
        best = int((rows @ weight - penalty).argmax())
        chosen[place] = best
        weight += mean - rows[best]
        penalty[best] = torch.inf
    return chosen


def _rows(features: Tensor, count: int) -> Tensor:
    """Features as (n, D) float64: sums over thousands of steps decide between near ties."""
    if features.ndim != 2:
        raise InputError(f"features are one row per sample (n, D), not of shape {tuple(features.shape)}")
    if not 0 <= count <= len(features):
        raise InputError(f"{count} samples cannot be chosen from {len(features)}")
    if not bool(torch.isfinite(features).all()):
        raise InputError("the features hold NaN or infinity: clean them first")
    return features.detach().double()
