"""What the links of a task say of its nodes, set against how well any predictor finds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.blocks.negative_links import UnlinkedPairs
from limbeck.core.data import mix_seed
from limbeck.metrics.concentration import (
    Concentration,
    approximate_concentration,
    concentration_shift,
    topological_concentration,
)
from limbeck.metrics.correlations import means_by_rank, pearson
from limbeck.metrics.link_indicators import correlation_rows, node_indicators
from limbeck.metrics.link_ranking import KS, NodeRanking, Scorer, hits_among, rank_nodes
from limbeck.report.decile_plots import decile_png
from limbeck.report.histograms import histogram_png
from limbeck.tasks.links import LinkTask

Part = Literal["train", "val", "test"]
_EXACT_UP_TO = 20_000
_HITS_AT = (20, 50, 100)


@dataclass(frozen=True)
class LinkStudy:
    """A task with the settings of its analysis; knows no predictor.

    Attributes:
        task: links in three parts.
        hops, beta: of the concentration; see :mod:`limbeck.metrics.concentration`.
        dim, draws: of its approximation.
        exact: count walks; False: approximate only; None: count up to 20,000 nodes.
        cut: K of the measures that indicators are set against.
        seed: of projections, unlinked pairs and the choice of nodes.
        most: rank for so many nodes at the most.
    """

    task: LinkTask
    hops: int = 2
    beta: float | None = None
    dim: int = 256
    draws: int = 8
    exact: bool | None = None
    cut: int = 10
    seed: int = 0
    most: int | None = 10_000

    @property
    def counted(self) -> bool:
        """Whether concentration is exact here."""
        return self.task.num_nodes <= _EXACT_UP_TO if self.exact is None else self.exact

    def concentration(
        self, part: Part = "train", *, hops: int | None = None, exact: bool | None = None
    ) -> Concentration:
        """Of every node, towards its neighbours in a part."""
        task, k = self.task, self.hops if hops is None else hops
        pairs = None if part == "train" else getattr(task, part)
        if self.counted if exact is None else exact:
            return topological_concentration(task.train, task.num_nodes, pairs, hops=k, beta=self.beta)
        return approximate_concentration(
            task.train,
            task.num_nodes,
            pairs,
            hops=k,
            beta=self.beta,
            dim=self.dim,
            draws=self.draws,
            seed=self.seed,
        )

    def indicators(self, part: Part = "test") -> dict[str, Tensor]:
        """What the links say of every node, (N,) each, the concentration in ``part`` first; validation links do not see test links."""
        task = self.task
        parts = {"valid": task.val} if part == "val" else {"valid": task.val, "test": task.test}
        return node_indicators(
            task.train,
            task.num_nodes,
            parts,
            hops=self.hops,
            beta=self.beta,
            exact=self.counted,
            dim=self.dim,
            draws=self.draws,
            seed=self.seed,
        )

    def shift(self) -> dict[str, float]:
        """Mean concentration of training and of test links, and their difference, over the nodes where both are defined.

        K is 1 (2 in a graph of two sides): from two hops on, a training neighbour's tree holds part of the node's own by construction.
        """
        hops = 1 if self.task.sides is None else 2
        return concentration_shift(*(self.concentration(part, hops=hops) for part in ("train", "test")))

    def ranking(self, score: Scorer, part: Part = "test") -> NodeRanking:
        """How every node with links in a part ranks them among all nodes that it is not known to be linked with."""
        task = self.task
        known = {"train": task.train[:, :0], "val": task.train, "test": torch.cat([task.train, task.val], 1)}[part]
        ks = sorted({*KS, self.cut})
        return rank_nodes(
            score,
            task.num_nodes,
            getattr(task, part),
            known,
            ks=ks,
            sides=task.sides,
            most=self.most,
            seed=self.seed,
        )

    def link_hits(
        self, score_pairs: Callable[[Tensor], Tensor], part: Part = "test", ks: Sequence[int] = _HITS_AT
    ) -> dict[int, float]:
        """By K, the share of a part's links that score above the K-th highest of unlinked pairs, as many as links and 5 K at the least.

        Args:
            score_pairs: pairs (B, 2) -> scores (B,).
            part: whose links. ks: the K.
        """
        task, links = self.task, getattr(self.task, part)
        every = torch.cat([task.train, task.val, task.test], 1)
        generator = torch.Generator().manual_seed(mix_seed(self.seed, ("train", "val", "test").index(part), 61))
        negative = UnlinkedPairs(task.num_nodes, every, task.sides).sample(max(links.shape[1], 5 * max(ks)), generator)
        with torch.no_grad():
            found, others = score_pairs(links.T), score_pairs(negative)
        return {k: hits_among(found, others, k) for k in ks}

    def judge(
        self, score: Scorer, score_pairs: Callable[[Tensor], Tensor] | None = None, part: Part = "test"
    ) -> dict[str, Any]:
        """A predictor judged, and what the links say set against it.

        Args:
            score: nodes (B,) -> scores with all nodes (B, N).
            score_pairs: pairs (B, 2) -> scores (B,); None: no hits of links.
            part: whose links.

        Returns:
            ``rows``: by indicator its correlations with the nodes' measures; the measures' means; ``link_hits_at_…``; mean concentration of training
            and test links (``tc_train``, ``tc_test``) and ``tc_shift``; ``atc_against_tc``; ``pictures``.
        """
        ranking, indicators, shift = self.ranking(score, part), self.indicators(part), self.shift()
        names = [f"{kind}_at_{self.cut}" for kind in ("recall", "hits", "ndcg", "precision", "f1")] + ["mrr"]
        found: dict[str, Any] = {"rows": correlation_rows(indicators, ranking, names)}
        if score_pairs is not None:
            found |= {f"link_hits_at_{k}": value for k, value in self.link_hits(score_pairs, part).items()}
        found |= {name: value for name, value in ranking.means().items() if name in names}
        found |= {"tc_train": shift["train"], "tc_test": shift["other"], "tc_shift": shift["shift"]}
        if self.counted:
            there = indicators["TC, train"] > 0
            found["atc_against_tc"] = pearson(indicators["TC, train"][there], indicators["ATC, train"][there])
        return {**found, "pictures": self.pictures(ranking, indicators)}

    def pictures(self, ranking: NodeRanking, indicators: Mapping[str, Tensor]) -> list[dict[str, str]]:
        """Recall by tenths of nodes, and histograms of the concentration of training and test links."""
        first = next(iter(indicators))
        kind = first.split(",")[0]
        shown = [n for n in (first, f"{kind}, train", "degree, train", "ego density") if n in indicators]
        recall = ranking.measures[f"recall_at_{self.cut}"]
        panels = {name: means_by_rank(indicators[name][ranking.nodes], recall) for name in shown}
        hops = 1 if self.task.sides is None else 2
        train, test = self.concentration("train", hops=hops), self.concentration("test", hops=hops)
        both = train.defined & test.defined
        groups = {"training links": train, "test links": test}
        return [
            {
                "title": f"Recall@{self.cut} of nodes, by tenths of what their links say",
                "caption": "Groups of nodes of (nearly) equal size, from the smallest value to the largest.",
                "png": decile_png(panels, f"mean recall@{self.cut}"),
            },
            {
                "title": "Concentration of training and of test links",
                "caption": f"K = {hops}, nodes that have both. Further left: links between nodes with less in common.",
                "png": histogram_png(
                    {n: c.values[both].clamp(0, 1).tolist() for n, c in groups.items()}, f"{kind} of a node"
                ),
            },
        ]
