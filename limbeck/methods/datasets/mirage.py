"""Mirage: graphs distilled into frequent sets of computation trees, by mining alone."""

from __future__ import annotations

import base64
import contextlib
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from limbeck.adapters.distilled_graphs import save_distilled_graphs
from limbeck.adapters.graphs import as_graphs
from limbeck.blocks.class_batches import ClassIndex
from limbeck.blocks.class_itemsets import ClassMiner, Mined, fill, pack, unpack
from limbeck.blocks.computation_trees import ComputationTrees, computation_trees, coverage
from limbeck.blocks.frequent_itemsets import Itemset, SupportSearch, TooManyItemsets, absolute
from limbeck.blocks.tree_items import item_bytes, mean_counts, tree_items
from limbeck.core.data import Data, mix_seed
from limbeck.core.distilled_graphs import DistilledGraphs, Sampling
from limbeck.core.errors import InputError
from limbeck.core.graphs import INT_BYTES, GraphData
from limbeck.core.stage import Stage
from limbeck.methods.datasets.base import DatasetDistiller, network_factory
from limbeck.networks.fresh import Factory
from limbeck.report.tree_sheets import drawn_forest, tree_sheet
from limbeck.tasks.base import Task, stratified_order
from limbeck.tasks.judging_graphs import judge_graphs

SHOWN = 6  # items of a class in the picture


class Mirage(DatasetDistiller):
    r"""Graphs distilled into frequent sets of computation trees.

    After L layers of message passing the state of a node depends on its computation tree of depth L and on nothing else: the node as
    root, and under every tree node all neighbours of the graph node that it stands for. A graph is thus a bag of trees, and over a
    data set few trees cover most nodes. For each class c the graphs become transactions, each the set of its distinct trees, and
    every itemset P that at least :math:`\theta_c` graphs of the class hold becomes an item of the distilled data set: the disjoint
    union of the trees in P, edges from child to parent, labelled c, with its support as frequency. No network takes part. Any
    message-passing network of at most L layers can train on the items, drawn in proportion to their frequencies, with a readout over
    the roots; it is tested on ordinary graphs with a readout over all nodes.

    :math:`\theta_c = \lceil s\, n_c \rceil` for :math:`n_c` graphs of class c. The relative support s is given, or the lowest one at
    which the items fit a budget of bytes or items is found by bisection; with ``support_ratio`` it is :math:`s\, r_c`, since published
    supports differ between classes and a common one can leave a class with hardly any item of its own. A class that would be left without an item has its own
    :math:`\theta_c` lowered until it has one.

    As a plain object::

        method = Mirage([Graph(labels, edge_index, y), ...], ipc=10)  # or torch_geometric graphs
        small = method.mine()
        network = train_on_graphs(gin, small, steps=200)

    Our decisions: trees without an edge are left out of the transactions, since their items would be; the discriminative filter is
    described in :mod:`limbeck.blocks.class_itemsets`; and since many itemsets share a support, what a budget leaves is filled with
    itemsets of the next lower one (``fill``). Extensions that the paper does not have, all off by default:
    ``max_len`` and the cap on the number of itemsets (the paper keeps all), root weights (``multiplicity``), degrees as a further
    label (``degrees``: without them a GCN, which divides by degrees, sees other numbers at a tree's leaves than in the graph), and
    drawing by class (``sampling``).

    Args:
        data: graphs with discrete node labels (see :func:`limbeck.adapters.graphs.as_graphs`).
        network: what is trained first when judging; mining needs none.
        config: hyper-parameters; or give single ones as keyword arguments.

    Raises:
        InputError: continuous features, one class only, supports that do not fit the classes.

    Source: "Mirage: Model-Agnostic Graph Distillation for Graph Classification" (2024).
    """

    name = "mirage"
    needs_network = False

    class Config(DatasetDistiller.Config):
        ipc: int = Field(
            10, ge=1, description="items per class to fit into, on average; other budgets and support overrule it"
        )
        hops: int = Field(
            2, ge=1, le=8, description="depth L of the trees: layers of the networks that are to train on them"
        )
        support: tuple[float, ...] = Field(
            (),
            description="least support: up to 1 a share of a class's graphs, above 1 a number of them; one for all classes, "
            "or one for each; none: the lowest that fits the budget",
        )
        support_ratio: tuple[float, ...] = Field(
            (),
            description="where the support is searched for: each class's as a factor (0 to 1) of the common one; none: 1 each",
        )
        target_bytes: int | None = Field(None, ge=1, description="budget in bytes; overrules the budget in items")
        target_items: int | None = Field(None, ge=1, description="budget in items; none: ipc for each class")
        fill: bool = Field(
            True, description="use up the budget with itemsets of the next lower support, those of fewest trees first"
        )
        max_len: int | None = Field(2, ge=1, description="most trees in an item; none: any number")
        most_itemsets: int = Field(
            5000, ge=1, description="most itemsets of a class; a support that gives more is too low"
        )
        discriminative: bool = Field(False, description="drop itemsets that are frequent in another class as well")
        sampling: Sampling = Field(
            "frequency",
            description="how training draws items: by frequency over all classes, by frequency within a class and classes as in "
            "the data (class-frequency), or all alike (uniform)",
        )
        multiplicity: bool = Field(
            False, description="weigh each root in the readout by how often its tree occurs in a graph on average"
        )
        degrees: bool = Field(
            False, description="tell trees apart by the degrees of their nodes too, and store them: for GCN"
        )
        judge_steps: int = Field(200, ge=1, description="updates that each network gets when judging")
        judge_lr: float = Field(0.01, gt=0, description="learning rate when judging (Adam, falling on a cosine)")

        presets = {
            "paper": {
                "hops": 2,
                "support": (0.27, 0.34),
                "max_len": None,
                "most_itemsets": 100_000,
                "discriminative": True,
                "sampling": "uniform",
                "judge_networks": ("gat-w64-l2-sum", "gcn-w64-l2-sum", "gin-w64-l2-sum"),
                "judge_steps": 3000,
                "judge_lr": 1e-3,
                "judge_seeds": 5,
            }
        }

        @field_validator("support", "support_ratio")
        @classmethod
        def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
            if any(not (math.isfinite(v) and v > 0) for v in value):
                raise ValueError("supports must be above 0")
            return value

    class Setup(DatasetDistiller.Setup):
        task: str = Field(
            "molecules",
            description="molecules, mutag, proteins, nci1, or with --data graphs: a folder in the TU text format",
        )
        network: str | None = Field(None, description="network that is trained first when judging; none: a GIN")

    real: GraphData

    def __init__(self, data: Any, network: Any = None, config: Any = None, **options: Any) -> None:
        graphs = as_graphs(data)
        if graphs.features is not None:
            raise InputError(
                "the graphs have continuous node features, and trees need discrete labels: quantise them first "
                "(limbeck.blocks.quantised_nodes.quantise), or leave them out"
            )
        super().__init__(graphs, network, config, **options)
        self.sizes: list[int] = self.classes.counts.tolist()
        given = self.config.support
        if len(given) not in (0, 1, self.num_classes):
            raise InputError(f"{len(given)} supports for {self.num_classes} classes: give one, or one for each class")
        for label, support in self.thresholds(None).items() if given else ():
            if support > self.sizes[label]:
                raise InputError(
                    f"a support of {support} graphs is more than the {self.sizes[label]} of class {label}: no itemset can reach it"
                )
        ratio = self.config.support_ratio or (1.0,) * self.num_classes
        if len(ratio) != self.num_classes or max(ratio) > 1:
            raise InputError(
                f"support_ratio must be {self.num_classes} factors up to 1, one for each class (got {ratio})"
            )
        self.ratio: tuple[float, ...] = ratio
        self.search = SupportSearch(self.sizes, ratio)
        self.mined: Mined = {}
        self.supports: dict[int, int] = {}
        self.finished = False

    def find_classes(self) -> ClassIndex:
        return ClassIndex(self.real.labels_tensor())

    @classmethod
    def on_task(cls, task: Task, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> Self:
        make = None if setup.network is None else network_factory(setup.network, task.in_shape, task.num_classes)
        return cls(task.train, make, config, seed=seed, class_names=task.class_names)

    # ---- trees and transactions --------------------------------------------------------------------------------------

    @functools.cached_property
    def trees(self) -> ComputationTrees:
        """The computation trees of all nodes of the training graphs."""
        whole = self.real.whole()
        labels = whole.node_labels
        if self.config.degrees:
            degrees = (
                torch.bincount(whole.edge_index[1], minlength=len(labels)) if whole.degrees is None else whole.degrees
            )
            labels = torch.cat([labels, degrees[:, None]], 1)
        kinds = None if whole.edge_labels is None else whole.edge_labels.numpy()
        return computation_trees(labels.numpy(), whole.edge_index.numpy(), self.config.hops, kinds)

    @functools.cached_property
    def miner(self) -> ClassMiner:
        """Each graph a transaction of its class: the distinct trees of its nodes that have an edge."""
        graph = torch.repeat_interleave(torch.arange(len(self.real)), self.real.node_ptr.diff()).numpy()
        connected = ~self.trees.single()[self.trees.of_node]
        y = self.real.y.numpy()[graph]
        chosen = [connected & (y == c) for c in range(self.num_classes)]
        return ClassMiner(
            [(graph[here], self.trees.of_node[here]) for here in chosen],
            max_len=self.config.max_len,
            limit=self.config.most_itemsets,
            discriminative=self.config.discriminative,
        )

    # ---- mining ------------------------------------------------------------------------------------------------------

    def thresholds(self, relative: float | None) -> dict[int, int]:
        """Absolute supports by class: from a relative one, or from those given."""
        given: tuple[float, ...] = self.config.support
        each = given * self.num_classes if len(given) == 1 else given
        if relative is not None:
            each = tuple(relative * r for r in self.ratio)
        return {
            c: absolute(v, n) if v <= 1 else math.ceil(v) for c, (v, n) in enumerate(zip(each, self.sizes, strict=True))
        }

    def cost(self, mined: Mined) -> tuple[int, int]:
        """Items and bytes of a distilled data set of these itemsets."""
        sets = [s for found in mined.values() for s in found]
        shared = self.num_classes if self.config.sampling == "class-frequency" else 0
        if self.real.centroids is not None:
            shared += self.real.centroids.numel()
        return len(sets), int(self._bytes_of(sets).sum()) + INT_BYTES * shared

    def _bytes_of(self, sets: Sequence[Itemset]) -> Any:
        """(N,) bytes of each itemset as an item, its frequency included."""
        labelled, per_root = self.real.edge_labels is not None, int(self.config.multiplicity)
        forests = item_bytes(self.trees, [s.items for s in sets], edge_labels=labelled, per_root=per_root)
        return forests + (0 if self.config.sampling == "uniform" else INT_BYTES)

    def room(self, mined: Mined) -> int:
        """What these itemsets leave of the budget, in bytes or items; below 0 they do not fit."""
        items, nbytes = self.cost(mined)
        if self.config.target_bytes is not None:
            return int(self.config.target_bytes) - nbytes
        wanted = self.config.target_items
        return (self.config.ipc * self.num_classes if wanted is None else int(wanted)) - items

    def fits(self, relative: float) -> bool:
        """Whether the items at a relative support keep to the budget."""
        try:
            return self.room(self.miner.mine_all(self.thresholds(relative))[0]) >= 0
        except TooManyItemsets:
            return False

    def _filled(self, mined: Mined) -> Mined:
        """The itemsets at the support that was found, and what fits of those at the next lower one. Where not even those at support 1
        fit, as many of them as do.

        Raises:
            InputError: the budget has no room for an item of each class.
        """
        found, more = self.search.found, mined
        kept: Mined = {label: [] for label in mined}
        if found is not None:
            place = self.search.supports.index(found)
            kept, more = mined, {}
            if self.config.fill and place:
                with contextlib.suppress(TooManyItemsets):  # then there is nothing to choose from
                    more = self.miner.mine_all(self.thresholds(self.search.supports[place - 1]))[0]
        in_bytes = self.config.target_bytes is not None
        full = fill(kept, more, lambda s: int(self._bytes_of([s])[0]) if in_bytes else 1, self.room(kept))
        if not all(full.values()) or (found is None and not self.config.fill):
            items, nbytes = self.cost(mined)
            raise InputError(
                f"the budget is too small: the itemsets of support 1 make {items} items in {nbytes} bytes, and "
                f"{'not one of each class fits' if self.config.fill else 'fill is off'}: raise target_bytes, target_items or ipc"
            )
        return full

    def mine(self) -> DistilledGraphs:
        """Everything at once, without an engine; the distilled data set.

        Raises:
            InputError: the budget is too small, or a class has no itemsets.
        """
        self.search.reset()
        while not self.config.support and self.search.candidate is not None:
            self._search_step()
        self._forget()
        for step in range(self.num_classes + 1):
            self._mining_step(step)
        return self.distilled()

    # ---- stages ------------------------------------------------------------------------------------------------------

    def stages(self, train: Data | None = None, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """The search for the support, a trial a step, where none is given; then the mining, a class a step and a last one for
        what classes have in common. Graphs are those that the method was made with."""
        shared: dict[str, Any] = {"state": {"search": self.search}}
        mining = Stage(
            "mining",
            self.num_classes + 1,
            update=lambda _, loop: self._mining_step(loop.step),
            begin=self._forget,
            **shared,
        )
        if self.config.support:
            return [mining]
        search = Stage(
            "support", self.search.trials, update=lambda *_: self._search_step(), begin=self.search.reset, **shared
        )
        return [search, mining]

    def _forget(self) -> None:
        self.mined, self.supports, self.finished = {}, {}, False

    def _search_step(self) -> dict[str, Tensor]:
        tried = self.search.candidate
        if tried is not None:
            self.search.tell(self.fits(tried))
        found = self.search.found
        return {"lowest_support_that_fits": torch.tensor(1.0 if found is None else found)}

    def _mining_step(self, step: int) -> dict[str, Tensor]:
        """Mine class number ``step``; after the last class, what classes have in common."""
        if not self.supports:
            found = self.search.found
            self.supports = self.thresholds(None if self.config.support else 1.0 if found is None else found)
        if step < self.num_classes:
            self.mined[step] = self.miner.mine(step, self.supports[step])
        else:
            self.mined, self.supports = self.miner.complete(self.mined, self.supports)
            if not self.config.support:
                self.mined = self._filled(self.mined)
            self.finished = True
        return {"itemsets": torch.tensor(float(sum(map(len, self.mined.values()))))}

    def get_extra_state(self) -> Tensor:
        """What was mined, as one row of numbers: it goes into checkpoints."""
        return torch.tensor([int(self.finished), *pack(self.mined, self.supports)], dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        finished, *numbers = state.tolist()
        self.finished = bool(finished)
        self.mined, self.supports = unpack(numbers)

    # ---- the distilled data set --------------------------------------------------------------------------------------

    def distilled(self) -> Any:
        """The items (:class:`limbeck.core.distilled_graphs.DistilledGraphs`), class by class, the most frequent first.

        Raises:
            InputError: nothing was mined yet.
        """
        if not self.finished:
            raise InputError("mirage has mined nothing yet: run its stages (limbeck.fit) or call mine() first")
        sets = [(s, c) for c, found in sorted(self.mined.items()) for s in found]
        items = tree_items(
            self.trees,
            [s.items for s, _ in sets],
            [c for _, c in sets],
            self.real.label_counts,
            edge_label_count=None if self.real.edge_labels is None else self.real.edge_label_count,
            degrees=self.config.degrees,
            weights=self._root_weights() if self.config.multiplicity else None,
            centroids=self.real.centroids,
        )
        sampling: Sampling = self.config.sampling
        return DistilledGraphs(
            items,
            self.num_classes,
            None if sampling == "uniform" else torch.tensor([s.support for s, _ in sets]),
            sampling,
            self.sizes if sampling == "class-frequency" else (),
            self.config.hops,
            self.class_names,
        )

    def _root_weights(self) -> Tensor:
        """How often each tree of each item occurs on average in the graphs of the class that hold the item."""
        graph = torch.repeat_interleave(torch.arange(len(self.real)), self.real.node_ptr.diff()).numpy()
        y = self.real.y.numpy()
        found = [
            mean_counts(self.trees.of_node, graph, y == c, [s.items for s in sets])
            for c, sets in sorted(self.mined.items())
        ]
        return torch.from_numpy(np.concatenate(found)).float()

    # ---- judging and keeping the result ------------------------------------------------------------------------------

    def random_selection(self, nbytes: int, seed: int = 0) -> Any:
        """Real graphs in random order, classes in their proportions, until they take at least ``nbytes`` and show every class."""
        order = stratified_order(self.real.y, mix_seed(self.seed, seed, 31))
        enough = int(torch.searchsorted(self.real.bytes_each()[order].cumsum(0), nbytes)) + 1
        shown = max(int((self.real.y[order] == c).nonzero()[0]) for c in range(self.num_classes)) + 1
        return self.whole_graphs(self.real.subset(order[: max(enough, shown)]))

    def whole_set(self) -> Any:
        return self.whole_graphs(self.real)

    def whole_graphs(self, graphs: GraphData) -> DistilledGraphs:
        """Whole graphs as a data set to train on."""
        return DistilledGraphs(graphs, self.num_classes, class_names=self.class_names)

    def judge_factories(self, sample: Any = None) -> dict[str, Factory]:
        """The networks that are trained on the contestants: as asked, or the method's own, a GIN, a GAT and a SAGE with a layer a hop."""
        edges = "" if self.real.edge_labels is None else f"-e{self.real.edge_label_count}"
        names = self.config.judge_networks or [
            f"{kind}-w32-l{self.config.hops}{edges}" for kind in ("gin", "gat", "sage")
        ]
        made = {n: network_factory(n, self.real.label_counts, self.num_classes) for n in names}
        if self.factory is None or self.config.judge_networks:
            return made
        return {self.network_name: self.factory, **made}

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """Fresh graph networks trained on the items, on random graphs of at least the same bytes, and on all graphs."""
        contestants: dict[str, Any] = dict(self.contestants())
        made = contestants["distilled"]
        rows = judge_graphs(
            contestants,
            self.judge_factories(),
            as_graphs(test),
            self.config,
            seed=self.seed,
            progress=self.show_progress,
        )
        return {
            "rows": rows,
            "share_of_real_bytes": made.share_of(self.real),
            "distinct_trees": len(self.trees),
            "tree_coverage": coverage(self.trees.of_node),
            **{f"support_of_class_{c}": s for c, s in sorted(self.supports.items())},
            "pictures": self.pictures(made),
        }

    def pictures(self, made: Any) -> list[dict[str, str]]:
        """The most frequent items of each class, drawn."""
        names = self.class_names or [str(c) for c in range(self.num_classes)]
        drawn, number = [], 0
        for label, sets in sorted(self.mined.items()):
            for place, itemset in enumerate(sets[:SHOWN]):
                line = f"{names[label]}: {itemset.support} of {self.sizes[label]}"
                drawn.append(drawn_forest(made.graphs, number + place, line))
            number += len(sets)
        caption = (
            f"{len(made)} items of depth {self.config.hops}; shown are at most {SHOWN} of each class, with the number of training graphs "
            "that hold them."
        )
        return [{"title": "Most frequent computation trees", "caption": caption, "png": tree_sheet(drawn)}]

    def save_artifact(self, folder: Path, description: dict[str, Any]) -> None:
        """The items as parquet, with a sheet of the most frequent ones."""
        made = self.distilled()
        about = {**description, "supports": {str(c): s for c, s in sorted(self.supports.items())}}
        save_distilled_graphs(made, folder, about, base64.b64decode(self.pictures(made)[0]["png"]))
