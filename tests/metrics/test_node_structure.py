from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
import torch

from limbeck.core.errors import InputError
from limbeck.metrics.link_indicators import correlation_rows, node_indicators
from limbeck.metrics.link_ranking import NodeRanking
from limbeck.metrics.node_structure import ego_density, link_degrees, mean_distances

torch.set_num_threads(1)


def a_graph() -> tuple[nx.Graph, torch.Tensor]:
    graph = nx.gnm_random_graph(25, 45, seed=4)
    return graph, torch.tensor(list(graph.edges)).T


def test_densities_are_those_of_the_subgraphs() -> None:
    graph, links = a_graph()
    found = ego_density(links, 25)
    for node in graph:
        inside = nx.ego_graph(graph, node)
        assert float(found[node]) == pytest.approx(nx.density(inside) if len(inside) > 1 else 0)
    assert link_degrees(torch.cat([links, links.flip(0)], 1), 25).tolist() == [graph.degree(n) for n in range(25)]


@pytest.mark.parametrize("block", [3, 1024])
def test_distances_are_cut_and_averaged(block: int) -> None:
    graph, links = a_graph()
    apart = torch.tensor([[u, v] for u in range(25) for v in range(u) if not graph.has_edge(u, v)][::7]).T
    found = mean_distances(links, 25, apart, limit=4, block=block)
    lengths = dict(nx.all_pairs_shortest_path_length(graph))
    for node in range(25):
        near = [v for pair in apart.T.tolist() if node in pair for v in pair if v != node]
        expected = np.mean([min(4, lengths[node].get(v, 4)) for v in near]) if near else np.nan
        assert float(found[node]) == pytest.approx(expected, nan_ok=True)
    with pytest.raises(InputError, match="cut at 1 or more"):
        mean_distances(links, 25, apart, limit=0)


def test_rows_say_how_each_indicator_goes_with_a_measure() -> None:
    _, links = a_graph()
    train, valid, test = links[:, :30], links[:, 30:36], links[:, 36:]
    found = node_indicators(train, 25, {"valid": valid, "test": test}, dim=16, draws=1)
    assert next(iter(found)) == "TC, test" and {"TC, train", "ATC, valid", "degree, test", "ego density"} <= set(found)
    nodes = torch.unique(test)
    ranking = NodeRanking(nodes, {"recall_at_5": 2 * found["degree, train"][nodes] + 1, "mrr": torch.zeros(len(nodes))})
    rows = {row["who"]: row for row in correlation_rows(found, ranking, ["recall_at_5", "mrr"])}
    assert rows["degree, train"]["pearson_recall_at_5"] == pytest.approx(1)
    assert rows["degree, train"]["spearman_recall_at_5"] == pytest.approx(1)
    assert np.isnan(rows["degree, train"]["pearson_mrr"])  # type: ignore[arg-type]
    few = node_indicators(train, 25, {"test": test}, exact=False, dim=4, draws=1)
    assert set(few) == {"ATC, test", "ATC, train", "degree, test", "degree, train"}
