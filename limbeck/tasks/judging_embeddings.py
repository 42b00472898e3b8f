"""How retrieval by embeddings is judged: ranks of what queries look for, the shape of the gallery, and rivals tuned on validation pairs."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.blocks.bank_norms import BankNorms, Index
from limbeck.blocks.inverse_convolution import merged
from limbeck.blocks.nearest_rows import unit_block
from limbeck.metrics.degeneration import Degeneration, degeneration, mean_shift
from limbeck.metrics.ranks import rank_measures, search_ranks
from limbeck.report.retrieval_plots import cosine_histogram_png, recall_curves_png
from limbeck.tasks.embeddings import EmbeddingPairs

KS = (1, 5, 10)


def ranks_of(index: Index, pairs: EmbeddingPairs, block: int = 1024) -> Tensor:
    """The rank (Q,) of what each query looks for, see :func:`limbeck.metrics.ranks.first_ranks`."""
    query_ids, gallery_ids = (pairs.query_ids, pairs.gallery_ids) if pairs.targets is None else (pairs.targets, None)
    return search_ranks(
        lambda start, stop: index.scores(pairs.query[start:stop]), len(pairs), query_ids, gallery_ids, block
    )


def objective(ranks: Tensor) -> float:
    """What settings are chosen by: R@1 + R@5 + R@10, 0 to 3."""
    return sum(float((ranks <= k).double().mean()) for k in KS)


def judged(who: str, index: Index, pairs: EmbeddingPairs, before: Any = None) -> dict[str, Any]:
    """A result's row: ranks; and for an index that is searched by plain cosines the shape of its gallery.

    Args:
        who: its name.
        before: the gallery as it was, for the mean distance to it.
    """
    row: dict[str, Any] = {"who": who, **rank_measures(ranks_of(index, pairs), KS)}
    if index.offset is None and index.shift is None:
        shape = degeneration(index.gallery, pairs.query, pairs.gallery_ids, pairs.query_ids)
        row |= {k: v for k, v in shape.as_dict().items() if k != "target_similarity"}
    if before is not None:
        row["shift"] = mean_shift(before, index.gallery)
    return row


@dataclass(frozen=True)
class Rival:
    """What the method is compared with, and the settings it may choose from.

    Attributes:
        label: for tables.
        index: how it corrects a gallery: (norms, **settings) -> index.
        grid: values by setting; all combinations are tried.
    """

    label: str
    index: Callable[..., Index]
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def candidates(self, most: int | None = None) -> list[dict[str, Any]]:
        """All combinations; evenly thinned to at most so many."""
        found = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        if most is None or len(found) <= max(1, most):
            return found
        return [found[round(n)] for n in np.linspace(0, len(found) - 1, most)]


def _even(low: float, high: float, count: int) -> tuple[float, ...]:
    return tuple(np.linspace(low, high, count).round(4).tolist())


def _spread(low: float, high: float, count: int) -> tuple[float, ...]:
    return tuple(np.geomspace(low, high, count).round(4).tolist())


def _whitened(norms: BankNorms, power: float, share: float) -> Index:
    return norms.whitened(power, max(1, round(share * norms.unit.shape[1])))


RIVALS: Mapping[str, Rival] = {
    "raw": Rival("untouched", BankNorms.plain),
    "centred-gallery": Rival(
        "gallery centred",
        lambda norms, strength: norms.centred(strength, None),
        {"strength": _even(0, 2, 147)},
    ),
    "centred": Rival(
        "both sides centred",
        BankNorms.centred,
        {"strength_gallery": _even(0, 2, 13), "strength_query": _even(0, 2, 13)},
    ),
    "whitened": Rival("PCA whitening", _whitened, {"power": _even(0, 1, 11), "share": _even(0.3, 1, 15)}),
    "inverted-softmax": Rival("inverted softmax", BankNorms.inverted_softmax, {"beta": _spread(1, 100, 147)}),
    "qb-norm": Rival(
        "QB-Norm, dynamic", BankNorms.inverted_softmax, {"beta": _spread(1, 100, 49), "hub_k": (1, 3, 10)}
    ),
    "db-norm": Rival(
        "DB-Norm",
        BankNorms.dual_norm,
        {"beta_query": (0.5025, *_spread(1, 60, 12)), "beta_gallery": (3.0, *_spread(0.5, 60, 12))},
    ),
}
"""Each that has settings has at least 147 of them: as many as the local form of the method at its default grids."""


def norms_of(bank: EmbeddingPairs, gallery: Any) -> BankNorms:
    return BankNorms(gallery, bank.gallery, bank.query)


def tuned(rival: Rival, bank: EmbeddingPairs, val: EmbeddingPairs, most: int | None = None) -> dict[str, Any]:
    """The settings of a rival that are best on validation pairs, the first of equal ones; ``most``: candidates, see there."""
    norms, candidates = norms_of(bank, val.gallery), rival.candidates(most)
    if len(candidates) == 1:
        return candidates[0]
    return max(candidates, key=lambda settings: objective(ranks_of(rival.index(norms, **settings), val)))


# ---- strengths -------------------------------------------------------------------------------------------------------


def strength_grid(
    of_gallery: Mapping[float, Tensor], of_query: Mapping[float, Tensor], pairs: EmbeddingPairs, block: int = 1024
) -> list[dict[str, Any]]:
    """What every pair of strengths is worth on ``pairs``.

    Args:
        of_gallery, of_query: the branch (N, D) of each bank by its strength.

    Returns:
        for each pair ``r_gallery``, ``r_query``, ``objective`` and what :func:`limbeck.metrics.ranks.rank_measures` gives.
    """
    found = []
    for (r_gallery, first), (r_query, second) in itertools.product(of_gallery.items(), of_query.items()):
        ranks = ranks_of(Index(merged([first, second])), pairs, block)
        setting = {"r_gallery": r_gallery, "r_query": r_query, "objective": objective(ranks)}
        found.append({**setting, **rank_measures(ranks, KS)})
    return found


def best_of(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """``r_gallery``, ``r_query`` and ``k`` of the row with the best objective, the first of equal ones."""
    best = max(found, key=lambda row: row["objective"])
    return {name: best[name] for name in ("r_gallery", "r_query", "k")}


def shape_of(pairs: EmbeddingPairs) -> Degeneration:
    """How narrow a gallery is, and what its queries find in it."""
    return degeneration(pairs.gallery, pairs.query, pairs.gallery_ids, pairs.query_ids)


def warn_if_hopeless(shape: Degeneration, untouched: bool) -> None:
    """Say so if spreading a gallery out is not expected to help, or if the best strengths that were tried are 0 (``untouched``)."""
    if not shape.help_expected:
        warnings.warn(
            f"InvGC is not expected to help: the mean cosine of two items is {shape.mean_cosine:.2f}, so there is no cone, and none is a "
            f"hub (skewness of their occurrences {shape.hubness:.2f})",
            stacklevel=3,
        )
    elif untouched:
        warnings.warn(
            "InvGC does not help here: no strength beats the untouched gallery on validation pairs", stacklevel=3
        )


# ---- pictures --------------------------------------------------------------------------------------------------------


def strength_picture(found: Sequence[Mapping[str, Any]], untouched: float) -> list[dict[str, str]]:
    """R@1 on validation pairs against r, where both strengths are equal, a curve for each number of neighbours; none if they never are.

    Args:
        found: what was tried, see :func:`strength_grid`, with ``k``.
        untouched: R@1 of the gallery as it was.
    """
    curves: dict[str, dict[float, float]] = {}
    for row in found:
        if row["r_gallery"] == row["r_query"]:
            label = "dense" if row["k"] is None else f"nearest {100 * row['k']:g} % of the bank"
            curves.setdefault(label, {})[row["r_gallery"]] = row["recall_at_1"]
    if not curves:
        return []
    strengths = sorted(set().union(*curves.values()))
    lines = {name: [values.get(r, float("nan")) for r in strengths] for name, values in curves.items()}
    png = recall_curves_png(
        strengths, lines, "r of both banks", "R@1 on validation pairs, %", level=("untouched", untouched)
    )
    return [{"title": "Recall against the strength", "png": png, "caption": "both strengths equal"}]


def cosine_picture(galleries: Mapping[str, Any], most: int = 1000) -> dict[str, str]:
    """The cosines in each gallery, of its first ``most`` items: of any two, and of each with its nearest."""
    groups: dict[str, list[float]] = {}
    for when, gallery in galleries.items():
        unit = unit_block(gallery, 0, min(most, len(gallery)))
        near = unit @ unit.T
        pairs = near[tuple(torch.triu_indices(len(unit), len(unit), 1))]
        groups[f"any two items, {when}"] = pairs[:: max(1, len(pairs) // 20_000)].tolist()
        groups[f"nearest two, {when}"] = near.fill_diagonal_(-2).amax(1).tolist() if len(unit) > 1 else []
    caption = "Of any two items, and of each item with its nearest; further left is more spread out"
    return {"title": "Cosines in the test gallery", "png": cosine_histogram_png(groups, "cosine"), "caption": caption}
