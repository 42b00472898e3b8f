r"""How generated samples are judged: distances between two sets, quality and coverage, agreement with conditions.

Sets are (N, D) or (N, ...), flattened, and taken in float64; pixels or features of any network, which the caller names. Distances between
all pairs are worked through in blocks, so memory stays linear in N. Everything returned is a plain number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from limbeck.core.errors import InputError

BLOCK_ELEMENTS = 1 << 22
"""Distances (or projected values) held at once."""


def frechet_distance(a: Tensor, b: Tensor) -> float:
    r"""Fréchet distance of the Gaussians with the moments of two sets: :math:`\lVert\mu_a-\mu_b\rVert^2 + \mathrm{tr}(\Sigma_a + \Sigma_b -
    2(\Sigma_a^{1/2}\Sigma_b\Sigma_a^{1/2})^{1/2})`.

    Exact, without shrinkage or added diagonal: the centred sets are factored (:math:`\Sigma = R^\top R`, never formed), and the last trace is
    the sum of the singular values of :math:`R_a R_b^\top`, so singular covariances do no harm and equal sets give 0. It is the squared
    2-Wasserstein distance of the two Gaussians.

    Bias: on finite sets it is too large, about in proportion to 1/N, the more so the larger D is (with N <= D the covariances are singular
    and the bias is large): compare numbers of equal N only. On features of an Inception network it is the FID.

    Args:
        a: (N, ...) one set.
        b: (M, ...) the other, of the same D.

    Returns:
        >= 0, in squared units of the features.

    Raises:
        InputError: different D, non-finite values, fewer than 2 samples (no covariance exists).

    Source: "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium" (2017).
    """
    a, b = _pair(a, b, least=2)
    roots = [torch.linalg.qr((x - x.mean(0)) / math.sqrt(len(x) - 1), mode="r").R for x in (a, b)]
    traces = sum(float(root.square().sum()) for root in roots)
    overlap = float(torch.linalg.svdvals(roots[0] @ roots[1].T).sum())
    mean = float((a.mean(0) - b.mean(0)).square().sum())
    return max(0.0, mean + traces - 2 * overlap)


def kernel_mmd(a: Tensor, b: Tensor, bandwidths: Sequence[float] = (0.05, 0.2, 0.5)) -> float:
    r"""Squared maximum mean discrepancy with the mean of Gaussian kernels :math:`e^{-d^2/(2h^2)}`; the unbiased estimate.

    Args:
        a: (N, ...); b: (M, ...) of the same D.
        bandwidths: every h > 0, in units of the samples.

    Returns:
        expectation 0 for equal distributions; single values may be slightly negative.

    Raises:
        InputError: as :func:`frechet_distance`; a bandwidth that is not positive.

    Source: "A Kernel Two-Sample Test" (2012).
    """
    a, b = _pair(a, b, least=2)
    if not bandwidths or min(bandwidths) <= 0:
        raise InputError(f"bandwidths must be positive numbers (got {tuple(bandwidths)})")

    def total(x: Tensor, y: Tensor) -> float:
        return sum(
            float(torch.exp(-block.square() / (2 * h * h)).sum()) for _, block in _distances(x, y) for h in bandwidths
        ) / len(bandwidths)

    n, m = len(a), len(b)
    within = (total(a, a) - n) / (n * (n - 1)) + (total(b, b) - m) / (m * (m - 1))
    return within - 2 * total(a, b) / (n * m)


def sliced_wasserstein(
    a: Tensor, b: Tensor, projections: int = 256, generator: torch.Generator | None = None, *, order: float = 2.0
) -> float:
    r"""Sliced Wasserstein distance: :math:`(\mathrm{mean}_\theta\, W_p^p(\theta^\top a, \theta^\top b))^{1/p}` over random unit vectors.

    In one dimension the distance is exact for sets of any sizes: the difference of the quantile functions, integrated piece by piece.

    Args:
        a: (N, ...); b: (M, ...) of the same D.
        projections: how many directions.
        generator: draws them; None: always the same ones, so that numbers can be compared.
        order: p >= 1.

    Returns:
        >= 0, in units of the samples.

    Raises:
        InputError: as :func:`frechet_distance`; no projections; p < 1.

    Source: "Sliced and Radon Wasserstein Barycenters of Measures" (2015).
    """
    a, b = _pair(a, b)
    if projections < 1 or order < 1:
        raise InputError(f"projections and order must be at least 1 (got {projections} and {order})")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    directions = torch.randn(a.shape[1], projections, generator=generator, dtype=torch.float64).to(a.device)
    directions = directions / directions.norm(dim=0)
    n, m = len(a), len(b)
    # The quantile functions are constant between the multiples of 1/n and of 1/m; in units of 1/(n m) those are integers.
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    widths = (torch.diff(ends, prepend=ends.new_zeros(1)).double() / (n * m)).to(a.device)
    rows, others = ((ends - 1) // m).to(a.device), ((ends - 1) // n).to(a.device)
    total = 0.0
    for part in directions.split(max(1, BLOCK_ELEMENTS // (n + m)), dim=1):
        gaps = (a @ part).sort(dim=0).values[rows] - (b @ part).sort(dim=0).values[others]
        total += float((widths[:, None] * gaps.abs() ** order).sum())
    return float((total / projections) ** (1 / order))


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> dict[str, float]:
    """Precision: the share of generated samples within the real set's balls; recall: the share of real samples within those of the fakes.

    A set's balls are around each of its samples, up to the sample's k-th nearest neighbour in the set (edge included).

    Args:
        real: (N, ...); fake: (M, ...) of the same D.
        k: 1 <= k < N, M.

    Returns:
        ``precision`` and ``recall`` in [0, 1].

    Raises:
        InputError: as :func:`frechet_distance`; too few samples for k.

    Source: "Improved Precision and Recall Metric for Assessing Generative Models" (Kynkäänniemi et al. 2019).
    """
    real, fake = _pair(real, fake)
    real_radii, fake_radii = _radii(real, k), _radii(fake, k)
    in_real = torch.zeros(len(fake), dtype=torch.bool, device=real.device)
    in_fake = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, block in _distances(real, fake):
        in_real |= (block <= real_radii[rows, None]).any(0)
        in_fake[rows] = (block <= fake_radii[None]).any(1)
    return {"precision": float(in_real.double().mean()), "recall": float(in_fake.double().mean())}


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> dict[str, float]:
    r"""Density: in how many of the real set's balls a generated sample lies, over k; coverage: the share of real balls that hold any.

    .. math:: \mathrm{density} = \frac{1}{kM}\sum_{j,i} 1[y_j \in B(x_i)], \qquad
        \mathrm{coverage} = \frac1N \sum_i 1[\exists j: y_j \in B(x_i)].

    Less moved by single outliers than :func:`precision_recall`: balls are those of the real set alone, edge included.

    Args:
        real: (N, ...); fake: (M, ...) of the same D.
        k: 1 <= k < N.

    Returns:
        ``density`` >= 0, about 1 for equal distributions, and ``coverage`` in [0, 1].

    Raises:
        InputError: as :func:`frechet_distance`; too few samples for k.

    Source: "Reliable Fidelity and Diversity Metrics for Generative Models" (Naeem et al. 2020).
    """
    real, fake = _pair(real, fake)
    radii, inside, covered = _radii(real, k), 0, 0
    for rows, block in _distances(real, fake):
        within = block <= radii[rows, None]
        inside += int(within.sum())
        covered += int(within.any(1).sum())
    return {"density": inside / (k * len(fake)), "coverage": covered / len(real)}


def modes_covered(samples: Tensor, means: Tensor, radius: float, *, least: float = 0.1) -> dict[str, float]:
    """How many of a mixture's modes the samples reach, and the share of samples near any mode.

    A mode counts when at least ``least`` times an equal share of the samples, N / K, is nearest to it and within the radius (our decision:
    one stray sample makes no mode).

    Args:
        samples: (N, D); means: (K, D).
        radius: > 0, e.g. 3 standard deviations of a component.
        least: in (0, 1].

    Returns:
        ``modes`` in 0..K and ``near_modes`` in [0, 1].

    Raises:
        InputError: different D, a radius or share out of range.
    """
    samples, means = _pair(samples, means)
    if not radius > 0 or not 0 < least <= 1:
        raise InputError(f"the radius must be positive and the least share in (0, 1] (got {radius} and {least})")
    counts = torch.zeros(len(means), dtype=torch.long, device=means.device)
    for _, block in _distances(samples, means):
        distance, nearest = block.min(1)
        counts += torch.bincount(nearest[distance <= radius], minlength=len(means))
    reached = int((counts >= max(1.0, least * len(samples) / len(means))).sum())
    return {"modes": float(reached), "near_modes": int(counts.sum()) / len(samples)}


def classes_covered(probabilities: Tensor) -> float:
    """Effective number of classes: the exponential of the entropy of a classifier's mean prediction.

    Args:
        probabilities: (N, C), rows that sum to 1.

    Returns:
        in [1, C].

    Raises:
        InputError: rows that are no probabilities.
    """
    p = probabilities.double()
    if p.ndim != 2 or not len(p) or float(p.min()) < 0 or float((p.sum(1) - 1).abs().max()) > 1e-3:
        raise InputError("classes_covered needs probabilities (N, C): not negative, each row with sum 1")
    mean = p.mean(0)
    return math.exp(-float(torch.special.xlogy(mean, mean).sum()))


def condition_agreement(logits: Tensor, labels: Tensor) -> float:
    """The share of samples that a classifier puts into the class they were asked for.

    Args:
        logits: (N, C); labels: (N,) class indices.

    Raises:
        InputError: shapes that do not fit.
    """
    if logits.ndim != 2 or labels.shape != (len(logits),):
        raise InputError(f"logits (N, C) and labels (N,) do not fit: {tuple(logits.shape)} and {tuple(labels.shape)}")
    return float((logits.argmax(1) == labels.to(logits.device)).double().mean())


def paired_mse(a: Tensor, b: Tensor) -> float:
    """Mean squared difference over all elements of samples from the same noise and condition.

    Raises:
        InputError: shapes that differ.
    """
    if a.shape != b.shape or not a.numel():
        raise InputError(f"paired samples must have one shape (got {tuple(a.shape)} and {tuple(b.shape)})")
    return float((a.double() - b.double()).square().mean())


def spread_ratio(samples: Tensor, reference: Tensor) -> float:
    """Mean standard deviation over the dimensions, as a ratio to that of the reference; below 1 where samples have collapsed.

    It is a ratio of means and not a mean of ratios: pixels that are constant in the reference would make the latter infinite.

    Raises:
        InputError: as :func:`frechet_distance`; a constant reference.
    """
    samples, reference = _pair(samples, reference, least=2)
    wanted = float(reference.std(0).mean())
    if wanted == 0:
        raise InputError("the reference samples are all the same: there is no spread to compare with")
    return float(samples.std(0).mean()) / wanted


# ---- helpers -----------------------------------------------------------------------------------------------------------


def _pair(a: Tensor, b: Tensor, *, least: int = 1) -> tuple[Tensor, Tensor]:
    """Both sets as (N, D) float64."""
    flat = [x.detach().reshape(len(x), -1).double() if x.ndim else x for x in (a, b)]
    for x in flat:
        if x.ndim != 2 or len(x) < least:
            raise InputError(f"at least {least} sample(s) (N, ...) are needed on each side (got {tuple(x.shape)})")
        if not bool(torch.isfinite(x).all()):
            raise InputError("samples or features hold NaN or infinity")
    if flat[0].shape[1] != flat[1].shape[1]:
        raise InputError(f"both sets must have equally many dimensions (got {flat[0].shape[1]} and {flat[1].shape[1]})")
    return flat[0], flat[1].to(flat[0].device)


def _distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Distances of rows of x to all of y, (rows, M) at a time, without the cancellation of the dot-product form."""
    size = max(1, BLOCK_ELEMENTS // len(y))
    for start in range(0, len(x), size):
        rows = slice(start, min(start + size, len(x)))
        yield rows, torch.cdist(x[rows], y, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(x: Tensor, k: int) -> Tensor:
    """(N,) the distance of each sample to its k-th nearest other one."""
    if not 1 <= k < len(x):
        raise InputError(f"k must be at least 1 and below the number of samples, {len(x)} (got {k})")
    return torch.cat([block.kthvalue(k + 1, dim=1).values for _, block in _distances(x, x)])
