"""What is known of every node from the links alone, and how it goes with how well the node's links are predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from limbeck.metrics.concentration import approximate_concentration, topological_concentration
from limbeck.metrics.correlations import pearson, spearman
from limbeck.metrics.link_ranking import NodeRanking
from limbeck.metrics.node_structure import clustering, ego_density, link_degrees, mean_distances


def node_indicators(
    train: Tensor,
    num_nodes: int,
    parts: Mapping[str, Tensor],
    *,
    hops: int = 2,
    beta: float | None = None,
    exact: bool = True,
    dim: int = 256,
    draws: int = 8,
    seed: int = 0,
) -> dict[str, Tensor]:
    """(N,) each, the concentration in the last part first.

    Args:
        train: (2, E) the training graph. num_nodes: N.
        parts: other links (2, M) by name, ``valid`` and ``test``, the one that is to be judged last.
        hops, beta: of the concentration.
        exact: with the concentration itself (and distances); False: its approximation only, for large graphs.
        dim, draws, seed: of the approximation.

    Returns:
        ``TC, test``, ``TC, valid``, ``TC, train``, the same for ``ATC``, ``degree, …``, ``clustering``, ``ego density`` and ``distance, …``.
    """
    links: dict[str, Tensor | None] = {name: parts[name] for name in reversed(list(parts))} | {"train": None}
    found: dict[str, Tensor] = {}
    for name, pairs in links.items() if exact else ():
        found[f"TC, {name}"] = topological_concentration(train, num_nodes, pairs, hops=hops, beta=beta).values
    for name, pairs in links.items():
        made = approximate_concentration(train, num_nodes, pairs, hops=hops, beta=beta, dim=dim, draws=draws, seed=seed)
        found[f"ATC, {name}"] = made.values
    for name, pairs in links.items():
        found[f"degree, {name}"] = link_degrees(train if pairs is None else pairs, num_nodes)
    if exact:
        found["clustering"], found["ego density"] = clustering(train, num_nodes), ego_density(train, num_nodes)
        judged = next(iter(links))
        if (pairs := links[judged]) is not None:
            found[f"distance, {judged}"] = mean_distances(train, num_nodes, pairs)
    return found


def correlation_rows(
    indicators: Mapping[str, Tensor], ranking: NodeRanking, measures: Sequence[str], ranked: str | None = None
) -> list[dict[str, float | str]]:
    """A row for each indicator: ``who``, its Pearson correlation with each measure over the ranked nodes, and Spearman's with one of them.

    A correlation with a constant is NaN. Nodes where an indicator is not finite are left out for it.

    Args:
        indicators: (N,) each, by name.
        ranking: of the nodes that have links to be found.
        measures: names of its measures.
        ranked: the measure of Spearman's; None: the first.
    """
    rows: list[dict[str, float | str]] = []
    chosen = measures[0] if ranked is None else ranked
    for name, values in indicators.items():
        mine = values.cpu()[ranking.nodes]
        there = torch.isfinite(mine)
        row: dict[str, float | str] = {"who": name}
        for measure in measures:
            row[f"pearson_{measure}"] = pearson(mine[there], ranking.measures[measure][there])
        row[f"spearman_{chosen}"] = spearman(mine[there], ranking.measures[chosen][there])
        rows.append(row)
    return rows
