r"""Structural equation models to draw data from: random DAGs, linear and nonlinear mechanisms, three kinds of noise.

Graphs and mechanisms follow the generators of the NOTEARS papers (2018, 2020); all of them are drawn from a ``numpy`` generator, node by node along the order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from scipy.spatial.distance import cdist
from scipy.special import expit

from limbeck.blocks.acyclicity import FloatArray
from limbeck.blocks.dags import topological_order
from limbeck.core.errors import InputError

Graph = Literal["er", "sf", "bipartite"]
Noise = Literal["gaussian", "exponential", "gumbel"]
Mechanism = Literal["linear", "logistic", "mlp", "mim", "gp"]
LIMIT = 1e100
"""Values that grow beyond it leave nothing to learn from."""


def random_dag(kind: Graph, nodes: int, edges: int, generator: np.random.Generator) -> FloatArray:
    """A DAG (d, d) of zeros and ones whose nodes are numbered at random.

    ``er`` draws the edges uniformly among all pairs; ``sf`` lets each new node choose about ``edges / nodes`` earlier ones, each with a chance in proportion to its
    degree plus one; ``bipartite`` draws edges from a fifth of the nodes to the others.

    Raises:
        InputError: more edges than there are pairs.
    """
    dag = np.zeros((nodes, nodes))
    if kind == "sf":
        each = max(1, round(edges / max(nodes, 1)))
        for node in range(1, nodes):
            chance = dag[:node].sum(1) + dag[:, :node].sum(0) + 1.0
            dag[generator.choice(node, min(each, node), replace=False, p=chance / chance.sum()), node] = 1.0
    else:
        top = max(1, nodes // 5)
        tails, heads = np.triu_indices(nodes, 1)
        if kind == "bipartite":
            kept = (tails < top) & (heads >= top)
            tails, heads = tails[kept], heads[kept]
        if edges > len(tails):
            raise InputError(
                f"{nodes} nodes have room for {len(tails)} edges in a graph of kind '{kind}', not {edges}: ask for fewer edges per node"
            )
        chosen = generator.choice(len(tails), edges, replace=False)
        dag[tails[chosen], heads[chosen]] = 1.0
    names = generator.permutation(nodes)
    return dag[np.ix_(names, names)]


def random_weights(dag: FloatArray, generator: np.random.Generator, low: float = 0.5, high: float = 2.0) -> FloatArray:
    """A weight of random sign for each edge, its size uniform in [low, high]."""
    sizes = generator.uniform(low, high, dag.shape) * generator.choice([-1.0, 1.0], dag.shape)
    return np.where(dag != 0, sizes, 0.0)


NOISES: Mapping[str, Callable[[np.random.Generator, float, int], FloatArray]] = {
    "gaussian": lambda generator, scale, n: generator.normal(0.0, scale, n),
    "exponential": lambda generator, scale, n: generator.exponential(scale, n),
    "gumbel": lambda generator, scale, n: generator.gumbel(0.0, scale, n),
}


def simulate(
    weights: FloatArray,
    samples: int,
    generator: np.random.Generator,
    *,
    mechanism: Mechanism = "linear",
    noise: Noise = "gaussian",
    scale: float = 1.0,
    hidden: int = 100,
) -> FloatArray:
    r"""Samples (n, d) of the model :math:`x_j = f_j(x_{parents}) + z_j`.

    ``linear``: weighted sums. ``logistic``: :math:`x_j` is 1 with the probability that the logistic function gives the weighted sum, else 0 (no further noise).
    ``mlp``: a random sigmoid network. ``mim``: :math:`\tanh(w_1^T x) + \cos(w_2^T x) + \sin(w_3^T x)`. ``gp``: a draw of a Gaussian process with
    the kernel :math:`e^{-\|x-x'\|^2/2}`.

    Args:
        weights: (d, d) of a DAG; the nonlinear mechanisms take its edges alone, and draw weights of their own.
        samples: how many.
        generator: draws everything.
        noise: its law; gumbel and exponential noise are not centred.
        scale: of the noise.
        hidden: units of the networks.

    Raises:
        InputError: the graph has a cycle, or values grow beyond all bounds.
    """
    data = np.zeros((samples, len(weights)))
    for node in topological_order(weights).tolist():
        parents = np.flatnonzero(weights[:, node])
        seen = data[:, parents]
        if mechanism == "logistic":
            data[:, node] = generator.random(samples) < expit(seen @ weights[parents, node])
            continue
        effect = (
            seen @ weights[parents, node] if mechanism == "linear" else _nonlinear(mechanism, seen, generator, hidden)
        )
        data[:, node] = effect + NOISES[noise](generator, scale, samples)
    if not np.isfinite(data).all() or float(np.abs(data).max(initial=0.0)) > LIMIT:
        raise InputError("values of the model grow beyond all bounds: take fewer nodes or edges, or another seed")
    return data


def _nonlinear(mechanism: Mechanism, seen: FloatArray, generator: np.random.Generator, hidden: int) -> FloatArray:
    n, k = seen.shape
    if k == 0:
        return np.zeros(n)

    def weights(*shape: int) -> FloatArray:
        return generator.uniform(0.5, 2.0, shape) * generator.choice([-1.0, 1.0], shape)

    if mechanism == "mlp":
        found: FloatArray = expit(seen @ weights(k, hidden)) @ weights(hidden)
        return found
    if mechanism == "mim":
        return np.asarray(np.tanh(seen @ weights(k)) + np.cos(seen @ weights(k)) + np.sin(seen @ weights(k)))
    kernel = np.exp(-0.5 * cdist(seen, seen, "sqeuclidean"))
    values, vectors = np.linalg.eigh(kernel)
    return np.asarray(vectors @ (np.sqrt(values.clip(0)) * generator.normal(size=n)))
