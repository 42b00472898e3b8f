"""How the tasks of :mod:`limbeck.tasks.node_classification` are read or generated.

Word counts (features that are nowhere below 0) of the citation data are divided by their sum in each row. A graph of one's own is an ``.npz`` file
without pickles: ``labels`` (N,), features ``x`` (N, F) or in compressed rows ``x_data``, ``x_indices``, ``x_indptr``, ``x_shape``, and either
``edge_index`` (2, E) (undirected) or the hyperedges ``edge_ptr`` (M + 1,), ``edge_nodes``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.core.hypergraphs import Hypergraph
from limbeck.core.node_graphs import NodeGraph
from limbeck.tasks.graph_files import ArrayFile, data_folder
from limbeck.tasks.node_classification import NodeSetup, NodeTask, hide, random_split
from limbeck.tasks.node_generators import HYPERGRAPH_NODES, SBM_NODES, hypergraph_sbm, sbm
from limbeck.tasks.planetoid import read_planetoid, rows_of

# The orders of the classes, which the files do not name; their sizes tell.
CORA_CLASSES = [
    "genetic algorithms",
    "theory",
    "rule learning",
    "neural networks",
    "case-based",
    "probabilistic methods",
    "reinforcement learning",
]
CORA_PLANETOID = [
    "theory",
    "reinforcement learning",
    "genetic algorithms",
    "neural networks",
    "probabilistic methods",
    "case-based",
    "rule learning",
]


def load_sbm(setup: NodeSetup) -> NodeTask:
    """A stochastic block model of 4 classes that are made of 5 hidden communities each, 1,600 nodes; see :func:`~limbeck.tasks.node_generators.sbm`."""
    nodes = setup.generated_nodes or SBM_NODES
    graph, _ = sbm(nodes, seed=setup.split_seed)
    assert graph.labels is not None
    return _split(setup, "sbm", graph, graph.features, graph.labels, "seeded stochastic block model")


def load_hypergraph_sbm(setup: NodeSetup) -> NodeTask:
    """A hypergraph of 5 classes, 1,000 vertices; see :func:`~limbeck.tasks.node_generators.hypergraph_sbm`."""
    nodes = setup.generated_nodes or HYPERGRAPH_NODES
    hypergraph, x, labels = hypergraph_sbm(nodes, seed=setup.split_seed)
    return _split(setup, "hypergraph-sbm", hypergraph, x, labels, "seeded hypergraph block model")


def load_planetoid(setup: NodeSetup) -> NodeTask:
    """Cora (2,708 papers, 7 classes) or CiteSeer (3,327 papers, 6 classes): citations, words of the abstracts."""
    folder = {"cora": "Cora", "citeseer": "CiteSeer"}[setup.task]
    where = data_folder(setup.task, setup.data_root, "planetoid") / "planetoid" / folder
    if not where.is_dir():
        raise InputError(f"no folder planetoid/{folder} in {where.parent.parent}: it should hold raw/ind.* files")
    x, labels, edges, public = read_planetoid(where)
    graph = NodeGraph.of(row_shares(torch.from_numpy(x)), torch.from_numpy(edges), torch.from_numpy(labels))
    split = {k: torch.from_numpy(v) for k, v in public.items()} if setup.public_split else None
    names = CORA_PLANETOID if setup.task == "cora" else None
    source = f"{folder} (Planetoid), {'public' if split else 'random'} split"
    if split:
        split["test"] = split["test"][graph.labels[split["test"]] >= 0]  # type: ignore[index]
    return _split(setup, setup.task, graph, graph.features, torch.from_numpy(labels), source, split, names)


def load_hypergraph(setup: NodeSetup) -> NodeTask:
    """Papers of Cora or Citeseer; a hyperedge holds the papers that one paper cites (co-citation) or one author wrote (co-authorship)."""
    path = data_folder(setup.task, setup.data_root, "hypergraphs") / "hypergraphs" / f"{setup.task}.npz"
    structure, x, labels = read_npz(path)
    names = CORA_CLASSES if setup.task.endswith("-cora") else None
    kind = "co-citation" if setup.task.startswith("cocitation") else "co-authorship"
    title = f"{setup.task.partition('-')[2].capitalize()}, {kind} hypergraph"
    return _split(setup, setup.task, structure, row_shares(x), labels, title, None, names)


def load_own(setup: NodeSetup) -> NodeTask:
    """A graph or hypergraph of one's own."""
    assert setup.data is not None
    path = Path(setup.data).expanduser()
    structure, x, labels = read_npz(path)
    return _split(setup, path.stem, structure, x, labels, str(path))


def read_npz(path: Path) -> tuple[NodeGraph | Hypergraph, Tensor, Tensor]:
    """Structure, features and labels of an ``.npz`` file; see the module.

    Raises:
        InputError: no such file, arrays missing or wrong, pickles.
    """
    held = ArrayFile(path)
    if "x" in held:
        x = held.numbers("x").float()
    else:
        data, shape = held.numbers("x_data").numpy(), held.numbers("x_shape", whole=True)
        indices, indptr = (held.numbers(f"x_{name}", whole=True).numpy() for name in ("indices", "indptr"))
        x = torch.from_numpy(rows_of(data, indices, indptr, tuple(shape.tolist()), path))
    labels = held.numbers("labels", whole=True)
    if "edge_index" in held:
        return NodeGraph.of(x, held.numbers("edge_index", whole=True), labels), x, labels
    pointer, members = (held.numbers(name, whole=True) for name in ("edge_ptr", "edge_nodes"))
    return Hypergraph(pointer, members, len(x)), x, labels


def row_shares(x: Tensor) -> Tensor:
    """Counts (N, F) divided by their sum in each row; rows of zeros, and features with values below 0, stay as they are."""
    if bool((x < 0).any()):
        return x
    return x / x.sum(1, keepdim=True).clamp_min(1e-12)


def _split(
    setup: NodeSetup,
    name: str,
    structure: NodeGraph | Hypergraph,
    x: Tensor,
    labels: Tensor,
    source: str,
    split: dict[str, Tensor] | None = None,
    names: list[str] | None = None,
) -> NodeTask:
    if setup.public_split and split is None:
        raise InputError(f"'{name}' is published with no split: leave out public_split")
    parts = split or random_split(labels, setup.labels_per_class, setup.val_size, setup.split_seed)
    hidden = parts["test"][:0]
    if setup.setting == "inductive":
        hidden = hide(parts["test"], setup.hidden_share, setup.split_seed)
    return NodeTask(
        name,
        structure,
        x,
        labels,
        parts["train"],
        parts["val"],
        parts["test"],
        hidden,
        class_names=names or (),
        source=source,
    )
