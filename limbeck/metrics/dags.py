"""How well a graph or an order was found: edges right and wrong, scores along an order."""

from __future__ import annotations

from limbeck.blocks.acyclicity import FloatArray, IntArray
from limbeck.blocks.dags import is_dag
from limbeck.blocks.prefix_problems import allowed
from limbeck.blocks.prefix_regression import LeastSquares, gram_of
from limbeck.core.errors import InputError


def edge_errors(found: FloatArray, truth: FloatArray) -> dict[str, float]:
    """A found DAG against the true one.

    Args:
        found, truth: (d, d) weights; what is not zero is an edge.

    Returns:
        ``shd``, the structural Hamming distance: missing, further and reversed edges, each reversed one once; ``fdr``: the share of found edges that are
        reversed or further; ``tpr``: the share of true edges found in their direction; ``fpr``: reversed and further edges per pair that the truth does not
        join; ``edges``: how many were found.

    Raises:
        InputError: matrices of different shapes, or no DAGs.
    """
    if found.shape != truth.shape:
        raise InputError(f"the graphs have different sizes: {found.shape} and {truth.shape}")
    for matrix in (found, truth):
        if not is_dag(matrix):
            raise InputError("edges are compared of DAGs: remove the cycles first")
    a, b = found != 0, truth != 0
    right = int((a & b).sum())
    reversed_ = int((a & b.T).sum())
    further = int(a.sum()) - right - reversed_
    missing = int(b.sum()) - right - reversed_
    d = len(a)
    pairs = d * (d - 1) // 2 - int(b.sum())
    return {
        "shd": float(missing + further + reversed_),
        "fdr": (further + reversed_) / max(int(a.sum()), 1),
        "tpr": right / max(int(b.sum()), 1),
        "fpr": (further + reversed_) / max(pairs, 1),
        "edges": float(a.sum()),
    }


def order_errors(order: IntArray, truth: FloatArray) -> float:
    """The share of true edges that an order turns round; 0 for every topological order of the truth."""
    edges = truth != 0
    return float((edges & (allowed(order) == 0)).sum() / max(int(edges.sum()), 1))


def order_score(order: IntArray, train: FloatArray, test: FloatArray | None = None) -> float:
    r""":math:`\frac{1}{2n} \|X - XW\|_F^2` of ``test`` (of ``train``, if None), W by least squares on ``train`` along the order.

    Both are centred by the means of ``train``. It makes results of different algorithms comparable: none is judged by weights that it shrank itself.

    Args:
        order: (d,).
        train, test: (n, d) samples.
    """
    centre = train.mean(0)
    weights = LeastSquares(gram_of(train)).fit(order).weights
    seen = (train if test is None else test) - centre
    return 0.5 * float(((seen - seen @ weights) ** 2).sum()) / len(seen)
