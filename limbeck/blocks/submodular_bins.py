"""Dataset quantisation: a data set cut once into submodular bins, from which subsets of any size are drawn.

::

    bins = dq_bins(embeddings, 10, labels)
    index = dq_sample(bins, ratio=0.1, seed=0)   # and 0.2, and another seed, without new bins

Source: "Dataset Quantization" (2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.blocks.coresets import apportion, class_counts, kept_count
from limbeck.blocks.similarity_kernels import DENSE, Kernel, Kind, similarity_kernel
from limbeck.blocks.submodular import FUNCTIONS, Chosen, Optimiser, greedy
from limbeck.core.errors import InputError, UnknownNameError

Take = Literal["uniform", "early", "late"]


@dataclass(frozen=True)
class Bins:
    """A partition of N samples.

    Attributes:
        bin: (N,) int64, from 0; bin 0 was chosen first.
        rank: (N,) int64, when the sample was chosen within its class, from 0; it grows with the bin.
        gain: (N,) float64, its gain when it was chosen.
        labels: (N,) int64; None: the bins are over all samples alike.
        count: number of bins.
    """

    bin: Tensor
    rank: Tensor
    gain: Tensor
    labels: Tensor | None
    count: int

    def __len__(self) -> int:
        return len(self.bin)

    def members(self, number: int, label: int | None = None) -> Tensor:
        """Ids of one bin (of one class), in the order in which they were chosen.

        Raises:
            InputError: there is no such bin, or no labels.
        """
        if not 0 <= number < self.count:
            raise InputError(f"there are bins 0 to {self.count - 1}, and no bin {number}")
        inside = self.bin == number
        if label is not None:
            if self.labels is None:
                raise InputError("these bins were made without labels: leave the label out")
            inside &= self.labels == label
        found = inside.nonzero().flatten()
        return found[self.rank[found].argsort(stable=True)]

    def sizes(self) -> Tensor:
        """(C, bins) int64: how many samples of each class are in each bin; one row without labels."""
        groups = self._groups()
        cells = groups * self.count + self.bin
        classes = int(groups.max()) + 1
        return torch.bincount(cells, minlength=classes * self.count).reshape(classes, self.count)

    def profile(self, values: Tensor | None = None) -> Tensor:
        """(bins,) float64: the mean over each bin of the gains, or of other ``values`` (N,); NaN for an empty bin."""
        values = self.gain if values is None else values.double()
        sums = torch.zeros(self.count, dtype=torch.float64).index_add_(0, self.bin, values)
        return sums / torch.bincount(self.bin, minlength=self.count)

    def _groups(self) -> Tensor:
        return torch.zeros_like(self.bin) if self.labels is None else self.labels


def bin_sizes(n: int, n_bins: int) -> list[int]:
    """b = round(n / N) each, and the last bin what is left.

    Where rounding up would leave the last bins empty, b is n // N; with fewer samples than bins there are n bins of one (our decisions).

    Raises:
        InputError: no bins or no samples.
    """
    if n_bins < 1 or n < 1:
        raise InputError(f"{n} samples cannot be divided into {n_bins} bins: both must be at least 1")
    number = min(n_bins, n)
    size = int(n / number + 0.5)
    if size * (number - 1) >= n:
        size = n // number
    return [size] * (number - 1) + [n - size * (number - 1)]


def cut_bin(
    kernel: Kernel,
    left: Tensor,
    size: int,
    *,
    function: str = "graph-cut",
    settings: Mapping[str, Any] | None = None,
    optimiser: Optimiser = "naive",
    generator: torch.Generator | None = None,
) -> Chosen:
    """One bin: chosen greedily from what the earlier ones left, on the kernel of what they left.

    Args:
        kernel: similarities of the class's n samples.
        left: (m,) positions that are in no bin yet.
        size: of the bin, at most m.
        function: ``graph-cut``, ``facility-location`` or ``log-det``.
        settings: further arguments of the function (``representativeness``, ``ridge``).
        optimiser, generator: see :func:`limbeck.blocks.submodular.greedy`.

    Returns:
        positions in order of choice, with their gains; on the CPU.

    Raises:
        UnknownNameError: no such function.
        InputError: see the function and the optimiser.
    """
    if function not in FUNCTIONS:
        raise UnknownNameError("set function", function, FUNCTIONS)
    # A new function each time: its sums go over what is left, without which all bins would be alike.
    part = kernel if len(left) == kernel.size else kernel.restrict(left.to(kernel.device))
    chosen = greedy(FUNCTIONS[function](part, **(settings or {})), size, optimiser, generator=generator)
    return Chosen(left.cpu()[chosen.order], chosen.gains)


def quantise(kernel: Kernel, n_bins: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Cut one class into bins, one after the other.

    Args:
        kernel: similarities of the class's n samples.
        n_bins: N.
        options: see :func:`cut_bin`.

    Returns:
        bin, rank (n,) int64 and gain (n,) float64 of each sample, on the CPU.
    """
    n = kernel.size
    bins, rank = torch.full((n,), -1), torch.empty(n, dtype=torch.long)
    gain = torch.empty(n, dtype=torch.float64)
    done = 0
    for number, size in enumerate(bin_sizes(n, n_bins)):
        chosen = cut_bin(kernel, (bins < 0).nonzero().flatten(), size, **options)
        bins[chosen.order], gain[chosen.order] = number, chosen.gains
        rank[chosen.order] = torch.arange(done, done + size)
        done += size
    return bins, rank, gain


def dq_bins(
    embeddings: Tensor,
    n_bins: int = 10,
    labels: Tensor | None = None,
    *,
    kernel: Kind = "cosine",
    function: str = "graph-cut",
    settings: Mapping[str, Any] | None = None,
    optimiser: Optimiser = "naive",
    generator: torch.Generator | None = None,
    dense: int = DENSE,
) -> Bins:
    """Cut a data set into bins, each class by itself where there are labels.

    Args:
        embeddings: (N, e).
        n_bins: 1 makes it a plain greedy order; as many as a class has samples makes sampling uniform.
        labels: (N,) int64, or None.
        kernel: ``cosine``: 0.5 + 0.5 cos; ``inner``: the inner product of unit vectors, as the paper takes for texts.
        function, settings, optimiser, generator: see :func:`cut_bin`.
        dense: a class whose kernel has at most so many entries gets it held as a matrix.

    Raises:
        InputError: lengths that differ, and see :func:`cut_bin`.
    """
    n = len(embeddings)
    if labels is not None and (labels.shape != (n,) or labels.is_floating_point()):
        raise InputError(
            f"labels are one class index per sample: {n} samples, labels {tuple(labels.shape)} of {labels.dtype}"
        )
    groups = torch.zeros(n, dtype=torch.long) if labels is None else labels.cpu()
    bins, rank = torch.empty(n, dtype=torch.long), torch.empty(n, dtype=torch.long)
    gain = torch.empty(n, dtype=torch.float64)
    for label in groups.unique().tolist():
        ids = (groups == label).nonzero().flatten()
        own = similarity_kernel(embeddings[ids.to(embeddings.device)], kernel, dense)
        bins[ids], rank[ids], gain[ids] = quantise(
            own, n_bins, function=function, settings=settings, optimiser=optimiser, generator=generator
        )
    return Bins(bins, rank, gain, None if labels is None else groups, min(n_bins, n))


def dq_sample(
    bins: Bins,
    ratio: float | None = None,
    seed: int = 0,
    *,
    ipc: int | None = None,
    count: int | None = None,
    take: Take = "uniform",
) -> Tensor:
    """Draw a subset: the same part of every bin of every class, without replacement.

    Numbers that are not whole are rounded so that the total is exactly ``round(ratio N)`` (or ``count``, or ``ipc`` of every class) and
    every sample is equally likely within its class.

    Args:
        bins: from :func:`dq_bins`.
        ratio: part of all samples to keep, in (0, 1], divided in proportion to the classes.
        seed: of the draw.
        ipc: instead, samples of each class.
        count: instead, samples of all classes together, divided in proportion.
        take: ``uniform``; ``early`` or ``late`` take whole bins from the first or the last on, which the paper shows to be worse. With one
            bin, ``early`` is the greedy selection of plain GraphCut.

    Returns:
        ids, ascending, int64.

    Raises:
        InputError: none or several of ``ratio``, ``ipc`` and ``count``, values out of range, a class with fewer than ``ipc``.
        UnknownNameError: unknown ``take``.
    """
    if take not in ("uniform", "early", "late"):
        raise UnknownNameError("way to take from bins", take, ("uniform", "early", "late"))
    generator = torch.Generator().manual_seed(seed)
    sizes = bins.sizes()
    groups = torch.zeros_like(bins.bin) if bins.labels is None else bins.labels
    if sum(given is not None for given in (ratio, ipc, count)) != 1:
        raise InputError("say how many: either ratio, ipc (samples of each class) or count (samples in all)")
    if ipc is not None:
        # classes that do not occur among the labels have nothing to give
        present, numbers = groups.unique(return_inverse=True)
        counts = torch.zeros(len(sizes), dtype=torch.long)
        counts[present] = class_counts(numbers, ipc=ipc)
    else:
        total = count if ratio is None else kept_count(len(bins), ratio)
        assert total is not None
        if not 1 <= total <= len(bins):
            raise InputError(f"{total} samples cannot be drawn from {len(bins)}")
        counts = apportion(sizes.sum(1), total, generator)
    if take == "uniform":
        quota = torch.stack(
            [
                apportion(row, c, generator) if c else torch.zeros_like(row)
                for row, c in zip(sizes, counts.tolist(), strict=True)
            ]
        )
        cells = groups * bins.count + bins.bin
        key = torch.rand(len(bins), generator=generator, dtype=torch.float64)
    else:
        quota, cells = counts, groups
        key = bins.rank.double() if take == "early" else -bins.rank.double()
    return _lowest(cells, quota.flatten(), key)


def _lowest(cells: Tensor, quota: Tensor, key: Tensor) -> Tensor:
    """From each cell the ``quota`` samples of lowest key, ascending ids."""
    order = key.argsort(stable=True)
    order = order[cells[order].argsort(stable=True)]
    held = torch.bincount(cells, minlength=len(quota))
    place = torch.arange(len(cells)) - (held.cumsum(0) - held)[cells[order]]
    return order[place < quota[cells[order]]].sort().values
