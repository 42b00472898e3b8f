"""Classification of the nodes of one graph or hypergraph: what is known of it, how its nodes are split, and what is hidden in training.

Splits are random and stratified, ``split_seed`` chooses one: so many labelled nodes of each class for training, ``val_size`` for validation, and the
rest for testing. In the inductive setting ``hidden_share`` of the test nodes, with their edges, is not there in training
(:meth:`NodeTask.observed`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from limbeck.adapters.node_graphs import as_hypergraph, from_pyg_hypergraph, from_pyg_node
from limbeck.core.batch import Batch
from limbeck.core.config import Config
from limbeck.core.data import Data, mix_seed
from limbeck.core.errors import InputError, UnknownNameError
from limbeck.core.hypergraphs import Hypergraph, from_graph
from limbeck.core.node_graphs import NodeGraph, hash_tensors, places

Setting = Literal["transductive", "inductive"]


class NodeSetup(Config):
    """Which graph, and which of its nodes are for what."""

    task: str = Field(
        "sbm",
        description="sbm, hypergraph-sbm (both generated), cora, citeseer, cocitation-cora, cocitation-citeseer, coauthorship-cora (files), or any name that --data explains",
    )
    data: str | None = Field(None, description="a graph or hypergraph of your own, an .npz file")
    data_root: str | None = Field(
        None, description="folder that holds planetoid/ and hypergraphs/; default: $LIMBECK_DATA"
    )
    setting: Setting = Field(
        "transductive", description="inductive: some test nodes are not in the graph while training"
    )
    hidden_share: float = Field(0.2, gt=0, lt=1, description="of the test nodes, in the inductive setting")
    labels_per_class: int = Field(20, ge=1, description="labelled training nodes of each class")
    val_size: int = Field(100, ge=1, description="validation nodes")
    public_split: bool = Field(False, description="cora and citeseer: the split that they are published with")
    generated_nodes: int | None = Field(
        None, ge=2, description="nodes of a generated graph; none: as many as its task has"
    )
    split_seed: int = Field(0, ge=0, description="seeds the split, and generated graphs")


@dataclass(frozen=True)
class NodeTask:
    """Nodes to be classified, and what joins them.

    Attributes:
        name: what it is called.
        structure: a :class:`~limbeck.core.node_graphs.NodeGraph` or a :class:`~limbeck.core.hypergraphs.Hypergraph` over the nodes.
        features: (N, F) float.
        labels: (N,) int64 classes; -1 where there is none.
        train, val, test: disjoint node numbers. ``val`` is for choosing, ``test`` is looked at once.
        hidden: those of ``test`` that are not there in training; empty in the transductive setting.
        num_classes: of labels.
        class_names: one each.
        source: where the data came from, for the record.
        kept: of an observed task, the numbers that its nodes have in the whole one.

    Raises:
        InputError: lengths that do not fit, parts that overlap, nodes without a label in a part, hidden nodes that are no test nodes.
    """

    name: str
    structure: NodeGraph | Hypergraph
    features: Tensor
    labels: Tensor
    train: Tensor
    val: Tensor
    test: Tensor
    hidden: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    num_classes: int = 0
    class_names: Sequence[str] = ()
    source: str = ""
    kept: Tensor | None = None

    def __post_init__(self) -> None:
        nodes = len(self.features)
        NodeGraph(self.features, torch.zeros(2, 0, dtype=torch.long))  # complains about features as a graph does
        if self.structure.num_nodes != nodes or self.labels.shape != (nodes,):
            raise InputError(
                f"{nodes} nodes with features, {self.structure.num_nodes} in the graph, {len(self.labels)} labels: they must be as many"
            )
        if not self.num_classes:
            object.__setattr__(self, "num_classes", int(self.labels.max()) + 1)
        if not self.class_names:
            object.__setattr__(self, "class_names", [str(c) for c in range(self.num_classes)])
        if self.num_classes < 2 or len(self.class_names) != self.num_classes:
            raise InputError(
                f"{self.num_classes} classes with {len(self.class_names)} names: two or more, one name each"
            )
        parts = torch.cat([self.train, self.val, self.test])
        if len(parts) and (int(parts.min()) < 0 or int(parts.max()) >= nodes):
            raise InputError(f"train, val and test hold numbers of nodes, 0 to {nodes - 1}")
        if len(torch.unique(parts)) != len(parts):
            raise InputError("a node is in two of train, val and test, or twice in one: parts must be disjoint")
        wrong = (self.labels[parts] < 0) | (self.labels[parts] >= self.num_classes)
        if bool(wrong.any()):
            raise InputError(f"node {int(parts[wrong][0])} is in a part but has no label of {self.num_classes} classes")
        if not len(self.train) or not len(self.val):
            raise InputError("there must be training and validation nodes")
        if not bool(torch.isin(self.hidden, self.test).all()):
            raise InputError("hidden nodes must be test nodes")

    # ---- making ----------------------------------------------------------------------------------------------------------

    @classmethod
    def of(
        cls, structure: Any, features: Any, labels: Any, *, train: Any, val: Any, test: Any = None, **more: Any
    ) -> NodeTask:
        """A task from one's own arrays.

        Args:
            structure: a NodeGraph, or anything that :func:`~limbeck.adapters.node_graphs.as_hypergraph` takes.
            features: (N, F). labels: (N,). train, val, test: node numbers or masks (N,) bool.
            more: ``hidden`` and further attributes.
        """
        x = torch.as_tensor(features)
        x = x if x.is_floating_point() else x.float()
        held = structure if isinstance(structure, NodeGraph) else as_hypergraph(structure, len(x))
        rows = {"train": train, "val": val, "test": test, "hidden": more.pop("hidden", None)}
        ids = {part: _ids(value, len(x)) for part, value in rows.items()}
        y = torch.as_tensor(labels).long()
        return cls(more.pop("name", "own"), held, x, y, ids["train"], ids["val"], ids["test"], ids["hidden"], **more)

    @classmethod
    def from_pyg(cls, data: Any, **more: Any) -> NodeTask:
        """A task from a torch_geometric ``Data`` with ``train_mask``, ``val_mask`` and ``test_mask``, and edges or hyperedges.

        Raises:
            InputError: one of them is missing.
        """
        parts = {part: getattr(data, f"{part}_mask", None) for part in ("train", "val", "test")}
        if parts["train"] is None or parts["val"] is None:
            raise InputError("the graph has no train_mask or val_mask: set them, or use NodeTask.of")
        if getattr(data, "hyperedge_index", None) is not None:
            hypergraph, x, y = from_pyg_hypergraph(data)
            return cls.of(hypergraph, x, _known(y), **parts, **more)
        graph = from_pyg_node(data)
        return cls.of(graph, graph.features, _known(graph.labels), **parts, **more)

    # ---- the structure ---------------------------------------------------------------------------------------------------

    @property
    def num_nodes(self) -> int:
        return len(self.features)

    @cached_property
    def graph(self) -> NodeGraph:
        """The graph; of a hypergraph its clique expansion."""
        if isinstance(self.structure, NodeGraph):
            return self.structure
        return NodeGraph(self.features, self.structure.clique_edges(), self.labels)

    @cached_property
    def hypergraph(self) -> Hypergraph:
        """The hypergraph, isolated vertices with a hyperedge of their own; of a graph every edge, and every node with its neighbours."""
        if isinstance(self.structure, Hypergraph):
            return self.structure.with_singletons()
        return from_graph(self.structure.edge_index, self.num_nodes)

    @cached_property
    def seen(self) -> Tensor:
        """The test nodes that are there in training."""
        return self.test[~torch.isin(self.test, self.hidden)]

    def observed(self) -> NodeTask:
        """The task without its hidden nodes, renumbered; ``kept`` says who is who. Its ``test`` are the seen ones."""
        return self._observed

    @cached_property
    def _observed(self) -> NodeTask:
        if not len(self.hidden):
            return replace(self, kept=torch.arange(self.num_nodes))
        there = torch.ones(self.num_nodes, dtype=torch.bool)
        there[self.hidden] = False
        kept = there.nonzero()[:, 0]
        place = places(kept, self.num_nodes)
        return replace(
            self,
            structure=self.structure.induced(kept),
            features=self.features[kept],
            labels=self.labels[kept],
            train=place[self.train],
            val=place[self.val],
            test=place[self.seen],
            hidden=self.hidden[:0],
            kept=kept,
        )

    # ---- for runs --------------------------------------------------------------------------------------------------------

    def parts(self) -> NodeParts:
        """Training, validation and test nodes as data."""
        return NodeParts(self, NodeData(self, self.train), NodeData(self, self.val), NodeData(self, self.test))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of nodes, structure and split (hex, 16 digits)."""
        edges = self.structure.edge_index if isinstance(self.structure, NodeGraph) else self.structure.index()
        return hash_tensors(self.features, self.labels, edges, self.train, self.val, self.test, self.hidden)

    def describe(self) -> dict[str, Any]:
        graph = isinstance(self.structure, NodeGraph)
        return {
            "name": self.name,
            "source": self.source,
            "nodes": self.num_nodes,
            "edges" if graph else "hyperedges": self.structure.num_edges,
            "features": self.features.shape[1],
            "classes": self.num_classes,
            "train": len(self.train),
            "val": len(self.val),
            "test": len(self.test),
            "hidden": len(self.hidden),
            "fingerprint": self.fingerprint,
        }


class NodeData(Data):
    """Some nodes of a task as samples: features, labels and node numbers."""

    def __init__(self, task: NodeTask, ids: Tensor) -> None:
        self.task, self.ids = task, ids

    def __len__(self) -> int:
        return len(self.ids)

    def fetch(self, index: Tensor, view: int | None) -> Batch:
        ids = self.ids[index]
        return Batch(self.task.features[ids], self.task.labels[ids], ids, view)

    def fingerprint(self) -> str:
        return hash_tensors(self.task.features, self.task.labels, self.ids)

    def labels_tensor(self) -> Tensor:
        return self.task.labels[self.ids]


@dataclass(frozen=True)
class NodeParts:
    """A task as a run by name wants it."""

    task: NodeTask
    train: NodeData
    val: NodeData
    test: NodeData

    @property
    def class_names(self) -> list[str]:
        return list(self.task.class_names)

    def describe(self) -> dict[str, Any]:
        return self.task.describe()


# ---- splits --------------------------------------------------------------------------------------------------------------


def random_split(labels: Tensor, labels_per_class: int, val_size: int, seed: int) -> dict[str, Tensor]:
    """Node numbers for training (so many of each class), validation (stratified) and testing (the rest); nodes with label -1 are in none.

    Raises:
        InputError: a class has too few nodes, or none would be left for testing.
    """
    generator = torch.Generator().manual_seed(mix_seed(seed, 13))
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order] >= 0]
    rank = _rank_in_class(labels[order])
    counts = torch.bincount(labels[order])
    if int(counts.min()) <= labels_per_class:
        few = int(counts.argmin())
        raise InputError(
            f"class {few} has {int(counts[few])} nodes: ask for fewer than {labels_per_class} labels per class"
        )
    train, rest = order[rank < labels_per_class], order[rank >= labels_per_class]
    if val_size >= len(rest):
        raise InputError(f"{val_size} validation nodes leave none of {len(rest)} for testing: ask for fewer")
    # The order of a node's share of its class mixes the classes evenly, so that any prefix is stratified.
    share = (_rank_in_class(labels[rest]).double() + 0.5) / torch.bincount(labels[rest])[labels[rest]]
    rest = rest[torch.argsort(share, stable=True)]
    return {"train": train.sort().values, "val": rest[:val_size].sort().values, "test": rest[val_size:].sort().values}


def hide(test: Tensor, share: float, seed: int) -> Tensor:
    """So much of the test nodes, at least one and not all, drawn at random."""
    generator = torch.Generator().manual_seed(mix_seed(seed, 17))
    count = min(len(test) - 1, max(1, round(share * len(test))))
    return test[torch.randperm(len(test), generator=generator)[:count]].sort().values


def _rank_in_class(labels: Tensor) -> Tensor:
    """How many of the same class stand before each."""
    order = torch.argsort(labels, stable=True)
    counts = torch.bincount(labels)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
    return rank


def _ids(value: Any, nodes: int) -> Tensor:
    if value is None:
        return torch.zeros(0, dtype=torch.long)
    found = torch.as_tensor(value)
    if found.dtype == torch.bool:
        if found.shape != (nodes,):
            raise InputError(f"a mask of {nodes} nodes has as many entries, not {tuple(found.shape)}")
        return found.nonzero()[:, 0]
    return found.long()


def _known(labels: Tensor | None) -> Tensor:
    if labels is None:
        raise InputError("the graph has no labels: set y")
    return labels


# ---- by name -------------------------------------------------------------------------------------------------------------

Loader = Callable[[NodeSetup], NodeTask]
_LOADERS = "limbeck.tasks.node_loaders"
NODE_TASKS: dict[str, str] = {
    "sbm": f"{_LOADERS}:load_sbm",
    "hypergraph-sbm": f"{_LOADERS}:load_hypergraph_sbm",
    "cora": f"{_LOADERS}:load_planetoid",
    "citeseer": f"{_LOADERS}:load_planetoid",
    "cocitation-cora": f"{_LOADERS}:load_hypergraph",
    "cocitation-citeseer": f"{_LOADERS}:load_hypergraph",
    "coauthorship-cora": f"{_LOADERS}:load_hypergraph",
}


def load_nodes(setup: NodeSetup) -> NodeTask:
    """A task by name, or from ``setup.data``.

    Raises:
        UnknownNameError: no such task.
        InputError: the data is missing or not what it should be.
    """
    target = NODE_TASKS.get(setup.task) if setup.data is None else f"{_LOADERS}:load_own"
    if target is None:
        raise UnknownNameError("task", setup.task, NODE_TASKS, hint=f"Known: {', '.join(NODE_TASKS)}.")
    module, _, name = target.partition(":")
    loader: Loader = getattr(importlib.import_module(module), name)
    return loader(setup)
