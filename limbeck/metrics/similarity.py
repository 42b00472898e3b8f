"""Similarity of representations: centred kernel alignment (CKA).

CKA compares two networks' features of the same samples, whatever their widths. It is 1 for features that agree up to rotation
and one common scale, and near 0 for unrelated ones. Features are (N, ...), flattened to (N, D) and taken in float64.

Sources: "Similarity of Neural Network Representations Revisited" (CKA); "Do Wide and Deep Networks Learn the Same Things?"
(mini-batches with the unbiased estimator); "Feature Selection via Dependence Maximization" (the unbiased estimator of HSIC).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from limbeck.core.errors import InputError, UnknownNameError

Kernel = Literal["linear", "rbf"]


def linear_cka(x: Tensor, y: Tensor, unbiased: bool = False) -> float:
    """CKA with linear kernels: ``|| Yᵀ X ||_F² / (|| Xᵀ X ||_F || Yᵀ Y ||_F)`` of the centred features.

    Works on N x N or on D x D matrices, whichever are smaller.

    Args:
        x: (N, ...) features of one network.
        y: (N, ...) features of another, same samples in the same order.
        unbiased: use :func:`hsic_unbiased` (needs N >= 4). The plain value is biased towards 1 when D is large against N.

    Returns:
        A number in [0, 1]; with ``unbiased`` it may be slightly negative.

    Raises:
        InputError: different N, fewer than 2 samples (4 if unbiased), non-finite or constant features.
    """
    x, y = _centred(x), _centred(y)
    _check_same(x, y)
    if not unbiased and len(x) > max(x.shape[1], y.shape[1]):
        cross, own = (y.T @ x).square().sum(), torch.linalg.norm(x.T @ x) * torch.linalg.norm(y.T @ y)
        return _ratio(float(cross), float(own))
    return _kernel_cka(x @ x.T, y @ y.T, unbiased)


def rbf_cka(x: Tensor, y: Tensor, bandwidth: float = 1.0, unbiased: bool = False) -> float:
    """CKA with Gaussian kernels ``exp(-d² / (2 sigma²))``, sigma = ``bandwidth`` times the median distance of two samples.

    Args:
        x, y, unbiased: as in :func:`linear_cka`.
        bandwidth: > 0, in medians. Small values compare near neighbours only, large ones tend to linear CKA.

    Returns:
        A number in [0, 1]; with ``unbiased`` it may be slightly negative.

    Raises:
        InputError: as in :func:`linear_cka`; ``bandwidth`` not positive; more than half of the pairs of samples coincide.
    """
    x, y = _centred(x), _centred(y)
    _check_same(x, y)
    return _kernel_cka(_rbf_kernel(x, bandwidth), _rbf_kernel(y, bandwidth), unbiased)


def hsic_unbiased(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741 - the literature's K and L
    """Unbiased estimate of the Hilbert-Schmidt independence criterion from two kernel matrices.

    With the diagonals of K and L set to 0:

        1 / (n (n-3)) · [ tr(K L) + (1ᵀK1)(1ᵀL1) / ((n-1)(n-2)) - 2 / (n-2) · 1ᵀ K L 1 ]

    Args:
        k: (n, n) or (A, n, n) symmetric kernel matrices, n >= 4.
        l: (n, n) or (B, n, n).

    Returns:
        A scalar; or (A, B), every K against every L, if both are stacks. May be negative.

    Raises:
        InputError: n < 4, or shapes that do not fit.
    """
    if k.shape[-2:] != l.shape[-2:] or k.ndim != l.ndim or k.ndim not in (2, 3) or k.shape[-1] != k.shape[-2]:
        raise InputError(
            f"HSIC needs two (stacks of) square matrices of one size, not {tuple(k.shape)} and {tuple(l.shape)}"
        )
    n = k.shape[-1]
    if n < 4:
        raise InputError(
            f"the unbiased HSIC needs at least 4 samples, not {n}; use larger batches or drop the last one"
        )
    stacks = (k, l) if k.ndim == 3 else (k.unsqueeze(0), l.unsqueeze(0))
    hollow = [m - torch.diag_embed(m.diagonal(dim1=1, dim2=2)) for m in stacks]
    rows_k, rows_l = (m.sum(2) for m in hollow)
    trace = hollow[0].flatten(1) @ hollow[1].flatten(1).T
    sums = torch.outer(rows_k.sum(1), rows_l.sum(1))
    both = rows_k @ rows_l.T
    value = (trace + sums / ((n - 1) * (n - 2)) - 2 / (n - 2) * both) / (n * (n - 3))
    return value if k.ndim == 3 else value[0, 0]


class MinibatchCKA:
    """CKA of all pairs of layers of two networks, accumulated over mini-batches.

    Numerator and denominators are the means over batches of :func:`hsic_unbiased`, each batch counting the same:

        CKA(a, b) = mean HSIC(K_a, L_b) / sqrt( mean HSIC(K_a, K_a) · mean HSIC(L_b, L_b) )

    so the batch size does not bias the estimates of HSIC, and no more than one batch of features is ever held.

    Args:
        kernel: ``"linear"`` or ``"rbf"``.
        bandwidth: of the RBF kernel, as in :func:`rbf_cka`; the median is taken in each batch.

    Example:
        >>> cka = MinibatchCKA()
        >>> for batch in loader:
        ...     cka.update(teacher_features(batch), student_features(batch))
        >>> cka.compute()      # (teacher layers, student layers)
    """

    def __init__(self, kernel: Kernel = "linear", bandwidth: float = 1.0) -> None:
        if kernel not in ("linear", "rbf"):
            raise UnknownNameError("kernel", str(kernel), ("linear", "rbf"))
        self.kernel, self.bandwidth = kernel, bandwidth
        self.batches = 0
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    def update(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """Add one batch.

        Args:
            first: the first network's features, one (B, ...) tensor per layer, B >= 4.
            second: the second network's, of the same samples.

        Raises:
            InputError: no layers, different batch sizes, B < 4, non-finite features, or other numbers of layers than before.
        """
        if not first or not second:
            raise InputError("CKA needs the features of at least one layer of each network")
        flat = [_centred(x) for x in (*first, *second)]
        for x in flat[1:]:
            _check_same(flat[0], x)
        kernels = torch.stack([self._gram(x).cpu() for x in flat])
        k, l = kernels[: len(first)], kernels[len(first) :]  # noqa: E741
        own_k, own_l = (torch.stack([hsic_unbiased(m, m) for m in stack]) for stack in (k, l))
        new = (hsic_unbiased(k, l), own_k, own_l)
        if self._sums is None:
            self._sums = new
        elif self._sums[0].shape != new[0].shape:
            raise InputError(
                f"earlier batches had {tuple(self._sums[0].shape)} layers and this one {tuple(new[0].shape)}; "
                "every update needs the same layers"
            )
        else:
            self._sums = (self._sums[0] + new[0], self._sums[1] + new[1], self._sums[2] + new[2])
        self.batches += 1

    def compute(self) -> Tensor:
        """The matrix of CKA values, float64 (layers of the first network, layers of the second).

        A layer with constant features has no CKA: its row or column is NaN.

        Raises:
            InputError: no batch was added.
        """
        if self._sums is None:
            raise InputError("no batch was added to the CKA; call update first")
        cross, own_k, own_l = self._sums
        # NaN where a network's own HSIC is not positive: rounding noise must not pass for a similarity
        scales = (torch.where(own > 0, own, torch.nan).sqrt() for own in (own_k, own_l))
        return cross / torch.outer(*scales)

    def reset(self) -> None:
        """Forget all batches."""
        self.batches, self._sums = 0, None

    def _gram(self, x: Tensor) -> Tensor:
        return x @ x.T if self.kernel == "linear" else _rbf_kernel(x, self.bandwidth)


def _centred(x: Tensor) -> Tensor:
    """(N, D) in float64, minus the mean: HSIC does not see the mean, but the digits lost to it would show."""
    if x.ndim < 2 or len(x) < 2:
        raise InputError(f"features must be (N, ...) with at least 2 samples, not {tuple(x.shape)}")
    x = x.detach().double().flatten(1)
    if not bool(x.isfinite().all()):
        raise InputError("the features hold NaN or infinity; the model has diverged")
    return x - x.mean(0)


def _check_same(x: Tensor, y: Tensor) -> None:
    if len(x) != len(y):
        raise InputError(f"both networks must see the same samples, but one has {len(x)} and the other {len(y)}")


def _rbf_kernel(x: Tensor, bandwidth: float) -> Tensor:
    if not bandwidth > 0:
        raise InputError(f"the bandwidth of the RBF kernel must be positive, not {bandwidth}")
    squared = torch.cdist(x, x).square()
    first, second = torch.triu_indices(len(x), len(x), offset=1, device=x.device)
    median = squared[first, second].median()
    if not bool(median > 0):
        raise InputError("the RBF kernel has no width: at least half of the pairs of samples have equal features")
    return (-squared / (2 * bandwidth**2 * median)).exp()


def _kernel_cka(k: Tensor, l: Tensor, unbiased: bool) -> float:  # noqa: E741
    if unbiased:
        cross, own_k, own_l = (float(hsic_unbiased(a, b)) for a, b in ((k, l), (k, k), (l, l)))
        return _ratio(cross, math.sqrt(max(own_k, 0.0)) * math.sqrt(max(own_l, 0.0)))
    k, l = (m - m.mean(0) - m.mean(1, keepdim=True) + m.mean() for m in (k, l))  # noqa: E741
    return _ratio(float((k * l).sum()), float(torch.linalg.norm(k) * torch.linalg.norm(l)))


def _ratio(cross: float, own: float) -> float:
    if not own > 0:
        raise InputError("the features are constant over the samples, so their similarity is undefined")
    return cross / own
