"""Prediction of links: a graph's links in three parts, and what is known of its nodes.

Splits are random (``split_seed`` chooses one) or by time, the earliest links for training. Message passing and everything that is computed from the
graph see the training links only.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.config import Config
from limbeck.core.data import Data, mix_seed
from limbeck.core.errors import InputError, UnknownNameError
from limbeck.core.node_graphs import NodeGraph, check_edges, hash_tensors

Split = Literal["random", "time"]


class LinkSetup(Config):
    """Which graph, and which of its links are for what."""

    task: str = Field(
        "closure",
        description="closure, growing (both generated), usair, celegans, yeast, power, ecoli, cora, citeseer (files), or any name that --data explains",
    )
    data: str | None = Field(
        None,
        description="a graph of your own: .mat with net, .npz with edge_index (2, E) and perhaps x, times and sides (users and items), or a text file with two nodes a line",
    )
    data_root: str | None = Field(None, description="folder that holds links/ and planetoid/; default: $LIMBECK_DATA")
    split: Split = Field("random", description="time: the earliest links for training, where the data has an order")
    val_share: float = Field(0.1, gt=0, lt=1, description="of the links, for validation")
    test_share: float = Field(0.2, gt=0, lt=1, description="of the links, for testing")
    generated_nodes: int | None = Field(
        None, ge=100, description="nodes of a generated graph; none: as many as its task has"
    )
    split_seed: int = Field(0, ge=0, description="seeds the split, and generated graphs")


@dataclass(frozen=True)
class LinkTask:
    """Links to be predicted.

    Attributes:
        name: what it is called.
        num_nodes: N.
        train, val, test: (2, m) int64 undirected links, each once, in no two parts. ``val`` is for choosing, ``test`` is looked at once.
        features: (N, F) float, or None: nodes are only known by their links.
        sides: (N,) of a graph of two sides, users and items: links join nodes of different sides. None: an ordinary graph.
        source: where the data came from, for the record.
        split: how it was split.

    Raises:
        InputError: links that name no node, self loops, a link twice or in two parts, no training links, features or sides that do not fit.
    """

    name: str
    num_nodes: int
    train: Tensor
    val: Tensor
    test: Tensor
    features: Tensor | None = None
    sides: Tensor | None = None
    source: str = ""
    split: str = "random"

    def __post_init__(self) -> None:
        if self.features is not None:
            NodeGraph(self.features, torch.zeros(2, 0, dtype=torch.long))  # complains about features as a graph does
            if len(self.features) != self.num_nodes:
                raise InputError(f"{self.num_nodes} nodes need as many rows of features, not {len(self.features)}")
        for part in (self.train, self.val, self.test):
            check_edges(part, self.num_nodes)
        every = torch.cat([self.train, self.val, self.test], 1)
        if bool((every[0] == every[1]).any()):
            node = int(every[0][every[0] == every[1]][0])
            raise InputError(
                f"node {node} is linked with itself: remove self loops, for example with LinkTask.from_edges"
            )
        keys, counts = torch.unique(self.keys(every), return_counts=True)
        if bool((counts > 1).any()):
            u, v = divmod(int(keys[counts > 1][0]), self.num_nodes)
            raise InputError(
                f"the link {u} - {v} is there twice, or in two parts: every link belongs to one part, once"
            )
        if not self.train.shape[1]:
            raise InputError("there must be training links")
        if self.sides is not None and (
            self.sides.shape != (self.num_nodes,) or bool((self.sides[every[0]] == self.sides[every[1]]).any())
        ):
            raise InputError(f"sides are {self.num_nodes} numbers such that every link joins two different ones")

    # ---- making ----------------------------------------------------------------------------------------------------------

    @classmethod
    def from_edges(
        cls,
        edges: Tensor,
        num_nodes: int | None = None,
        *,
        features: Tensor | None = None,
        times: Tensor | None = None,
        split: Split = "random",
        val_share: float = 0.1,
        test_share: float = 0.2,
        seed: int = 0,
        **more: Any,
    ) -> LinkTask:
        """A task from all links of a graph, in any order and direction; self loops and repetitions are dropped.

        Args:
            edges: (2, E). num_nodes: N; None: as many as there are rows of features, or the largest node plus 1.
            features: (N, F) or None.
            times: (E,) of the links; None: their order. A link that repeats has its earliest time.
            split, val_share, test_share, seed: which links are for what.
            more: further attributes.
        """
        size = num_nodes if num_nodes is not None else len(features) if features is not None else int(edges.max()) + 1
        train, val, test = split_links(
            edges, size, split=split, times=times, val_share=val_share, test_share=test_share, seed=seed
        )
        return cls(more.pop("name", "own"), size, train, val, test, features, split=split, **more)

    @classmethod
    def from_pyg(cls, data: Any, **more: Any) -> LinkTask:
        """A task from a torch_geometric ``Data`` with ``edge_index`` (and ``x``); ``time`` or ``edge_time`` (E,) serve a split by time."""
        x = getattr(data, "x", None)
        times = getattr(data, "edge_time", getattr(data, "time", None))
        features = None if x is None else torch.as_tensor(x).float()
        count = len(features) if features is not None else int(data.num_nodes)
        given = None if times is None else torch.as_tensor(times)
        return cls.from_edges(torch.as_tensor(data.edge_index).long(), count, features=features, times=given, **more)

    @classmethod
    def from_ogb(
        cls, split_edge: Mapping[str, Any], num_nodes: int, features: Tensor | None = None, **more: Any
    ) -> LinkTask:
        """A task from the split of an OGB data set, ``{"train": {"edge": (M, 2)}, "valid": …, "test": …}``.

        A link that repeats counts once, in the earliest of its parts.
        """
        found, known = [], torch.zeros(0, dtype=torch.long)
        for name in ("train", "valid", "test"):
            if name not in split_edge:
                raise InputError(f"the split has no part '{name}': it needs train, valid and test")
            edges = torch.as_tensor(split_edge[name]["edge"]).long().T
            check_edges(edges, num_nodes)
            edges = edges[:, edges[0] != edges[1]]
            keys = torch.unique(edges.amin(0) * num_nodes + edges.amax(0))
            keys = keys[~torch.isin(keys, known)]
            known = torch.cat([known, keys])
            found.append(torch.stack([keys // num_nodes, keys % num_nodes]))
        train, val, test = found
        return cls(more.pop("name", "own"), num_nodes, train, val, test, features, split="published", **more)

    # ---- the graph -------------------------------------------------------------------------------------------------------

    @cached_property
    def graph(self) -> NodeGraph:
        """The training links in both directions; features of ones where there are none."""
        return self.graph_with(self.train)

    def graph_with(self, links: Tensor) -> NodeGraph:
        """The same nodes with other links (2, m)."""
        features = torch.ones(self.num_nodes, 1) if self.features is None else self.features
        return NodeGraph.of(features, links)

    def keys(self, links: Tensor) -> Tensor:
        """(m,) a number for each link, the same in both directions."""
        return links.amin(0) * self.num_nodes + links.amax(0)

    # ---- for runs --------------------------------------------------------------------------------------------------------

    def parts(self) -> LinkParts:
        """Training, validation and test links as data.

        Raises:
            InputError: a part is empty.
        """
        return LinkParts(self, LinkData(self, "train"), LinkData(self, "val"), LinkData(self, "test"))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of nodes and links (hex, 16 digits)."""
        return hash_tensors(self.features, self.train, self.val, self.test, self.sides)

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "source": self.source,
            "nodes": self.num_nodes,
            "features": 0 if self.features is None else self.features.shape[1],
            "split": self.split,
            "train": self.train.shape[1],
            "val": self.val.shape[1],
            "test": self.test.shape[1],
            "fingerprint": self.fingerprint,
        }


class LinkData(Data):
    """The links of one part as samples: pairs (B, 2) of nodes."""

    def __init__(self, task: LinkTask, part: Literal["train", "val", "test"]) -> None:
        self.task, self.part = task, part
        self.links: Tensor = getattr(task, part)
        if not self.links.shape[1]:
            raise InputError(f"part '{part}' has no links: give one or more")

    def __len__(self) -> int:
        return self.links.shape[1]

    def fetch(self, index: Tensor, view: int | None) -> Batch:
        return Batch(self.links[:, index].T.contiguous(), None, index, view)

    def fingerprint(self) -> str:
        return hash_tensors(self.links)


@dataclass(frozen=True)
class LinkParts:
    """A task as a run by name wants it."""

    task: LinkTask
    train: LinkData
    val: LinkData
    test: LinkData
    class_names: None = None

    def describe(self) -> dict[str, Any]:
        return self.task.describe()


def split_links(
    edges: Tensor,
    num_nodes: int,
    *,
    split: Split = "random",
    times: Tensor | None = None,
    val_share: float = 0.1,
    test_share: float = 0.2,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Training, validation and test links (2, m), each link once; see :meth:`LinkTask.from_edges`.

    Raises:
        InputError: links that name no node, shares that leave nothing for training, too few links, times that do not fit.
    """
    check_edges(edges, num_nodes)
    if val_share + test_share >= 1:
        raise InputError(
            f"shares of {val_share:g} and {test_share:g} leave no link for training: take less than 1 together"
        )
    if times is not None and (times.shape != edges.shape[1:] or bool(times.isnan().any())):
        raise InputError(f"{edges.shape[1]} links need as many times, none of them NaN (got {tuple(times.shape)})")
    if times is not None:
        edges = edges[:, torch.argsort(times, stable=True)]
    edges = edges[:, edges[0] != edges[1]]
    keys, place = torch.unique(edges.amin(0) * num_nodes + edges.amax(0), return_inverse=True)
    first = torch.full((len(keys),), len(place)).scatter_reduce(0, place, torch.arange(len(place)), "amin")
    keys = keys[torch.argsort(first)]  # in the order in which they come first
    if split == "random":
        # By number first, so that the split does not depend on the order in which the links are listed.
        generator = torch.Generator().manual_seed(mix_seed(seed, 19))
        keys = keys.sort().values[torch.randperm(len(keys), generator=generator)]
    elif split != "time":
        raise InputError(f"links are split random or by time, not '{split}'")
    val, test = round(val_share * len(keys)), round(test_share * len(keys))
    if min(val, test, len(keys) - val - test) < 1:
        raise InputError(f"{len(keys)} links are too few to be split in three")
    links = torch.stack([keys // num_nodes, keys % num_nodes])
    train = len(keys) - val - test
    return links[:, :train], links[:, train : train + val], links[:, train + val :]


# ---- by name -------------------------------------------------------------------------------------------------------------

Loader = Callable[[LinkSetup], LinkTask]
_LOADERS = "limbeck.tasks.link_loaders"
LINK_TASKS: dict[str, str] = {
    "closure": f"{_LOADERS}:load_closure",
    "growing": f"{_LOADERS}:load_growing",
    **dict.fromkeys(("usair", "celegans", "yeast", "power", "ecoli"), f"{_LOADERS}:load_matrix"),
    **dict.fromkeys(("cora", "citeseer"), f"{_LOADERS}:load_citations"),
}


def load_links(setup: LinkSetup) -> LinkTask:
    """A task by name, or from ``setup.data``.

    Raises:
        UnknownNameError: no such task.
        InputError: the data is missing or not what it should be.
    """
    target = LINK_TASKS.get(setup.task) if setup.data is None else f"{_LOADERS}:load_own"
    if target is None:
        raise UnknownNameError("task", setup.task, LINK_TASKS, hint=f"Known: {', '.join(LINK_TASKS)}.")
    module, _, name = target.partition(":")
    loader: Loader = getattr(importlib.import_module(module), name)
    return loader(setup)
