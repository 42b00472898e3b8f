r"""How narrow the cone is that embeddings lie in, and how uneven it makes retrieval.

The degeneration score of a gallery is the mean cosine of two different items; with the similarity of each item to its nearest other one, and
the hubness of the gallery for its queries, it says whether spreading the embeddings out can help.

Source: "InvGC: Robust Cross-Modal Retrieval by Inverse Graph Convolution" (2023); hubness: "Hubs in Space" (2010).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from limbeck.blocks.nearest_rows import BLOCK, Block, Rows, checked_rows, top_k, unit_block, unit_blocks
from limbeck.core.errors import InputError

ISOTROPIC = 0.1
"""Mean cosine below which there is no cone to speak of."""
EVEN = 1.0
"""Hubness below which items occur about evenly (independent draws of ten have a skewness of 0.3)."""


def degeneration_score(embeddings: Rows, block: Block = BLOCK) -> float:
    r"""The mean cosine of two different rows, from the sum of all rows at length 1: no matrix of similarities is made.

    .. math:: \Delta = \frac{\|\sum_i x_i\|^2 - \sum_i \|x_i\|^2}{N (N - 1)}

    Raises:
        InputError: fewer than two rows, NaN or infinity.
    """
    count = _several(embeddings)
    total, squares = torch.zeros((), dtype=torch.float64), 0.0
    for _, unit in unit_blocks(embeddings, block[1]):
        total = total + unit.double().sum(0)
        squares += float(unit.double().square().sum())
    return float((total.square().sum() - squares) / (count * (count - 1)))


def nearest_similarity(embeddings: Rows, block: Block = BLOCK) -> float:
    """The mean over rows of the cosine with the nearest other row.

    Raises:
        InputError: fewer than two rows, NaN or infinity.
    """
    _several(embeddings)
    return float(top_k(embeddings, embeddings, 1, skip="same", block=block)[0].double().mean())


def occurrences(queries: Rows, gallery: Rows, k: int = 10, block: Block = BLOCK) -> Tensor:
    """How many queries have each gallery item among their ``k`` nearest: (N,) int64."""
    _, places = top_k(queries, gallery, min(k, len(gallery)), block=block)
    return torch.bincount(places.flatten(), minlength=len(gallery))


def hubness(queries: Rows, gallery: Rows, k: int = 10, block: Block = BLOCK) -> float:
    """The skewness of :func:`occurrences`: large where few items are near to most queries. 0 where all occur alike."""
    return skewness(occurrences(queries, gallery, k, block))


def skewness(values: Tensor) -> float:
    """The third standardised moment; 0 for constant values."""
    centred = values.double() - values.double().mean()
    variance = centred.square().mean()
    return float((centred**3).mean() / variance**1.5) if float(variance) > 0 else 0.0


def mean_shift(before: Rows, after: Rows, block: Block = BLOCK) -> float:
    """The mean distance between rows before and after, both at length 1.

    Raises:
        InputError: other shapes.
    """
    if tuple(before.shape) != tuple(after.shape):
        raise InputError(f"shapes differ: {tuple(before.shape)} before, {tuple(after.shape)} after")
    total = 0.0
    for start, unit in unit_blocks(checked_rows(before), block[0]):
        moved = unit_block(after, start, start + len(unit), unit.device).to(unit.dtype)
        total += float((moved - unit).norm(dim=1).double().sum())
    return total / len(before)


@dataclass(frozen=True)
class Degeneration:
    """A gallery before retrieval.

    Attributes:
        mean_cosine: of two different items.
        nearest_similarity: of an item and the nearest other one.
        target_similarity: of a query and the item it looks for.
        hubness: skewness of how often items are among the ten nearest of a query.
    """

    mean_cosine: float
    nearest_similarity: float
    target_similarity: float
    hubness: float

    @property
    def help_expected(self) -> bool:
        """Whether spreading the gallery out is expected to help: there is a cone, or some items are hubs.

        Our decision, with thresholds that were set by looking at a few galleries: that items are nearer to each other than queries to their targets is no sign by itself; well-spread embeddings of
        contrastive encoders show it too.
        """
        return self.mean_cosine >= ISOTROPIC or self.hubness > EVEN

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def degeneration(
    gallery: Rows,
    queries: Rows,
    gallery_ids: Tensor | None = None,
    query_ids: Tensor | None = None,
    block: Block = BLOCK,
) -> Degeneration:
    """Measure a gallery (N, D) and queries (Q, D); ids as in :func:`limbeck.metrics.ranks.first_ranks`.

    Raises:
        InputError: shapes that do not fit, fewer than two items.
    """
    return Degeneration(
        degeneration_score(gallery, block),
        nearest_similarity(gallery, block),
        target_similarity(gallery, queries, gallery_ids, query_ids, block),
        hubness(queries, gallery, block=block),
    )


def target_similarity(
    gallery: Rows,
    queries: Rows,
    gallery_ids: Tensor | None = None,
    query_ids: Tensor | None = None,
    block: Block = BLOCK,
) -> float:
    """The mean cosine of a query and an item that it looks for (the first one with its id)."""
    checked_rows(queries, "the queries' embeddings", gallery.shape[1])
    wanted = torch.arange(len(queries)) if query_ids is None else query_ids.cpu()
    if gallery_ids is not None:
        order = gallery_ids.cpu().argsort(stable=True)
        place = torch.searchsorted(gallery_ids.cpu()[order], wanted).clamp_max(len(order) - 1)
        wanted = torch.where(gallery_ids.cpu()[order[place]] == wanted, order[place], -1)
    if not bool(((wanted >= 0) & (wanted < len(gallery))).all()):
        raise InputError("a query looks for an item that is not in the gallery: check the ids")
    total = 0.0
    for start, unit in unit_blocks(queries, block[0]):
        rows = wanted[start : start + len(unit)]
        picked = gallery[rows.to(gallery.device)] if isinstance(gallery, Tensor) else gallery[rows.numpy()]
        own = unit_block(picked, 0, len(rows), unit.device).to(unit.dtype)
        total += float((own * unit).sum().double())
    return total / len(queries)


def _several(embeddings: Rows) -> int:
    if len(checked_rows(embeddings)) < 2:
        raise InputError("similarities between items need at least two of them")
    return len(embeddings)
