"""Classification of graphs: the TU data sets, folders in their text format, and a generator of molecule-like graphs.

In the text format a folder holds, for a data set NAME, ``NAME_A.txt`` (a line "u, v" for each directed edge; nodes are numbered
from 1 over all graphs), ``NAME_graph_indicator.txt`` (each node's graph, from 1), ``NAME_graph_labels.txt`` and, where there are
any, ``NAME_node_labels.txt``, ``NAME_edge_labels.txt`` and ``NAME_node_attributes.txt`` (continuous, separated by commas).

Graphs are split 80/10/10 into training, validation and test parts, stratified; ``split_seed`` chooses the split.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limbeck.core.data import mix_seed
from limbeck.core.errors import InputError
from limbeck.core.graphs import Graph, GraphData
from limbeck.tasks.base import Task, TaskConfig, data_root, flip_labels, stratified_order, take

HELD = 0.1  # of the graphs for validation, and as many for testing
MOLECULES, TEST_MOLECULES = 600, 600
NOISE = 0.1  # of the molecules' labels
NETWORKS = {"student": "gin-w32-l2"}
Ints = NDArray[np.int64]


def load_mutag(config: TaskConfig) -> Task:
    """MUTAG: 188 nitroaromatic compounds, mutagenic or not; 7 atoms."""
    return _known(config, "MUTAG")


def load_proteins(config: TaskConfig) -> Task:
    """PROTEINS: 1,113 proteins, enzymes or not; 3 kinds of secondary structure."""
    return _known(config, "PROTEINS")


def load_nci1(config: TaskConfig) -> Task:
    """NCI1: 4,110 compounds, active against lung cancer cells or not; 37 atoms."""
    return _known(config, "NCI1")


def load_folder(config: TaskConfig) -> Task:
    """Graphs of one's own: ``config.data`` is a folder in the TU text format, or one with such a folder ``raw`` in it."""
    if config.data is None:
        raise InputError("task 'graphs' needs a folder in the TU text format: give it with --data")
    folder = Path(config.data).expanduser()
    graphs, classes = read_tu(folder)
    return _task(config, folder.name, graphs, classes, str(folder))


def load_molecules(config: TaskConfig) -> Task:
    """600 molecule-like graphs for training and validation (8 to 1) and 600 for testing, see :func:`molecules`.

    As they are drawn and cost nothing, the test part is larger than a tenth.
    """
    graphs = molecules(MOLECULES, seed=config.split_seed)
    order = stratified_order(graphs.y, config.split_seed)
    held = round(HELD * len(order) / (1 - HELD))
    parts = {
        "train": graphs.subset(order[held:].sort().values),
        "val": graphs.subset(order[:held].sort().values),
        "test": molecules(TEST_MOLECULES, seed=mix_seed(config.split_seed, 1)),
    }
    source = f"seeded generator of molecule-like graphs, {NOISE:.0%} of the labels wrong"
    return _made(config, "molecules", parts, ["amide-like", "nitro-like"], source)


# ---- the TU text format ------------------------------------------------------------------------------------------------


def read_tu(folder: Path) -> tuple[GraphData, list[str]]:
    """All graphs of a folder in the TU text format, and the names of their classes (the file's numbers).

    Node and edge labels are numbered from 0 in the order of the file's numbers. Without node labels and attributes a node's label
    is its degree.

    Raises:
        InputError: missing files, lines that are no numbers, or files that do not belong together.
    """
    where, name = _find(folder)

    def file(part: str) -> Path:
        return where / f"{name}_{part}.txt"

    pairs = _read(file("A"), 2) - 1
    owner = _read(file("graph_indicator"), 1)[:, 0] - 1
    y = _read(file("graph_labels"), 1)[:, 0]
    nodes, graphs = len(owner), len(y)
    wrong = np.flatnonzero(((pairs < 0) | (pairs >= nodes)).any(1))
    if len(wrong):
        raise InputError(
            f"{file('A').name} names node {pairs[wrong[0]].max() + 1} in line {wrong[0] + 1}, but {file('graph_indicator').name} has {nodes} nodes"
        )
    if owner.min() < 0 or owner.max() >= graphs:
        raise InputError(
            f"{file('graph_indicator').name} goes from {owner.min() + 1} to {owner.max() + 1}, but {file('graph_labels').name} has {graphs} graphs"
        )
    crossing = (owner[pairs[:, 0]] != owner[pairs[:, 1]]).nonzero()[0]
    if len(crossing):
        raise InputError(f"{file('A').name} joins nodes of two graphs in line {crossing[0] + 1}")
    by_node = {p: _optional(file(p), nodes) for p in ("node_labels", "node_attributes")}
    edge_labels = _optional(file("edge_labels"), len(pairs))
    order = np.argsort(owner, kind="stable")  # nodes of a graph together
    place = np.empty(nodes, dtype=np.int64)
    place[order] = np.arange(nodes)
    sizes = np.bincount(owner, minlength=graphs)
    starts = np.cumsum(sizes) - sizes
    edges = place[pairs] - starts[owner[pairs[:, 0]], None]
    by_graph = np.argsort(owner[pairs[:, 0]], kind="stable")
    if by_node["node_labels"] is not None:
        labels = np.unique(by_node["node_labels"].astype(np.int64), return_inverse=True)[1].reshape(nodes, -1)
    elif by_node["node_attributes"] is not None:
        labels = np.zeros((nodes, 1), dtype=np.int64)
    else:
        labels = np.bincount(pairs[:, 1], minlength=nodes)[:, None]
    classes, y = np.unique(y, return_inverse=True)
    found = None
    if edge_labels is not None:
        found = torch.from_numpy(np.unique(edge_labels.astype(np.int64), return_inverse=True)[1].ravel()[by_graph])
    attributes = by_node["node_attributes"]
    data = GraphData(
        torch.from_numpy(y),
        torch.from_numpy(labels[order]),
        _ptr(sizes),
        torch.from_numpy(edges[by_graph].T.copy()),
        _ptr(np.bincount(owner[pairs[:, 0]], minlength=graphs)),
        found,
        features=None if attributes is None else torch.from_numpy(attributes[order].astype(np.float32)),
    )
    return data, [str(c) for c in classes]


def _find(folder: Path) -> tuple[Path, str]:
    """The folder with the files, and the data set's name."""
    for where in (folder, folder / "raw"):
        found = sorted(where.glob("*_A.txt"))
        if len(found) == 1:
            return where, found[0].name.removesuffix("_A.txt")
        if found:
            raise InputError(f"{where} holds several data sets ({', '.join(p.name for p in found[:3])}): one a folder")
    raise InputError(f"no graphs in {folder}: the TU text format has a file NAME_A.txt there or in its folder raw/")


def _read(path: Path, columns: int) -> Ints:
    """A file of integers (N, columns)."""
    table = _table(path)
    if table.shape[1] != columns or not np.array_equal(table, np.trunc(table)):
        raise InputError(f"{path} must have {columns} integer{'s' * (columns > 1)} in every line")
    found: Ints = table.astype(np.int64)
    return found


def _optional(path: Path, rows: int) -> NDArray[np.float64] | None:
    if not path.is_file():
        return None
    table = _table(path)
    if len(table) != rows:
        raise InputError(f"{path.name} has {len(table)} lines, {rows} are needed")
    return table


def _table(path: Path) -> NDArray[np.float64]:
    import pandas

    if not path.is_file():
        raise InputError(f"no file {path}: the TU text format needs it")
    try:
        frame = pandas.read_csv(path, header=None, dtype=np.float64, skipinitialspace=True)
    except ValueError as error:  # pandas' own errors are ValueErrors too
        raise InputError(f"{path} holds something that is no number ({' '.join(str(error).split())[:120]})") from error
    table: NDArray[np.float64] = frame.to_numpy()
    broken = np.flatnonzero(~np.isfinite(table).all(1))
    if len(broken):
        raise InputError(f"{path} has no finite number in line {broken[0] + 1}")
    return table


def _ptr(sizes: Ints) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]))


# ---- parts -------------------------------------------------------------------------------------------------------------


def _known(config: TaskConfig, name: str) -> Task:
    root = data_root(config)
    if root is None:
        raise InputError(
            f"task '{name.lower()}' needs its data: give the folder that holds tu/ with --data-root or LIMBECK_DATA"
        )
    folder = root / "tu" / name
    if not folder.is_dir():
        raise InputError(f"no folder tu/{name} in {root}: it should hold raw/{name}_A.txt and the other files")
    graphs, classes = read_tu(folder)
    return _task(config, name.lower(), graphs, classes, f"{name} (TU Dortmund), {len(graphs)} graphs")


def _task(config: TaskConfig, name: str, graphs: GraphData, classes: list[str], source: str) -> Task:
    if len(classes) < 2:
        raise InputError(f"'{name}' has one class only: classification needs at least two")
    order = stratified_order(graphs.y, config.split_seed)
    held = max(1, round(HELD * len(order)))
    rows = {"test": order[:held], "val": order[held : 2 * held], "train": order[2 * held :]}
    parts = {part: graphs.subset(ids.sort().values) for part, ids in rows.items()}
    return _made(config, name, parts, classes, source)


def _made(config: TaskConfig, name: str, parts: dict[str, GraphData], classes: list[str], source: str) -> Task:
    if config.labelled is not None:
        raise InputError(f"task '{name}' keeps all its labels: leave out labelled={config.labelled}")
    train = parts["train"]
    train = train.subset(take(train.y, config.train_size, config.split_seed))
    if len(torch.unique(train.y)) < len(classes):
        raise InputError(
            f"{len(train)} training graphs do not show all {len(classes)} classes: use a larger train_size"
        )
    train = train.with_labels(flip_labels(train.y, config.label_noise, len(classes), config.split_seed))
    edges = f"-e{train.edge_label_count}" if train.edge_labels is not None else ""
    return Task(
        name=name,
        train=train,
        val=parts["val"],
        test=parts["test"],
        num_classes=len(classes),
        in_shape=train.label_counts,
        class_names=classes,
        networks={role: network + edges for role, network in NETWORKS.items()},
        source=source,
    )


# ---- molecule-like graphs ----------------------------------------------------------------------------------------------

CARBON, NITROGEN, OXYGEN, HALOGEN = range(4)
_Group = tuple[tuple[int, int], ...]  # (label, parent): a parent of -1 is the atom that the group hangs on
NITRO: _Group = ((NITROGEN, -1), (OXYGEN, 0), (OXYGEN, 0))
AMIDE: _Group = ((CARBON, -1), (OXYGEN, 0), (NITROGEN, 0))
SUBSTITUENTS: tuple[_Group, ...] = (
    ((CARBON, -1),),  # methyl
    ((CARBON, -1), (CARBON, 0)),  # ethyl
    ((CARBON, -1), (CARBON, 0), (CARBON, 1)),  # propyl
    ((CARBON, -1), (CARBON, 0), (CARBON, 0)),  # isopropyl
    ((OXYGEN, -1),),  # hydroxyl
    ((OXYGEN, -1), (CARBON, 0)),  # methoxy
    ((OXYGEN, -1), (CARBON, 0), (CARBON, 1)),  # ethoxy
    ((NITROGEN, -1),),  # amino
    ((NITROGEN, -1), (CARBON, 0), (CARBON, 0)),  # dimethylamino
    ((CARBON, -1), (NITROGEN, 0)),  # cyano
    ((CARBON, -1), (OXYGEN, 0), (OXYGEN, 0)),  # carboxyl
    ((CARBON, -1), (OXYGEN, 0), (CARBON, 0)),  # acetyl
    ((HALOGEN, -1),),
    ((CARBON, -1), (HALOGEN, 0), (HALOGEN, 0), (HALOGEN, 0)),  # trifluoromethyl
)


def molecules(count: int, *, seed: int = 0, noise: float = NOISE) -> GraphData:
    """Molecule-like graphs in two classes, whose computation trees are as skewed as those of molecules.

    One to three six-rings of label 0, fused in a row, carry zero to two common substituents and one group that tells the class:
    class 1 a nitro-like one (a node of label 1 with two of label 2), class 0 an amide-like one (a node of label 0 with one of label 2
    and one of label 1). Then ``noise`` of the labels are flipped, so no classifier can be right more often than 1 - ``noise``.

    Args:
        count: how many, half of each class.
        seed: of all draws.
        noise: fraction of wrong labels.
    """
    generator = np.random.default_rng(mix_seed(seed, 17))
    y = generator.permutation(np.arange(count) % 2)
    graphs = [_molecule(int(c), generator) for c in y]
    flipped = flip_labels(torch.from_numpy(y), noise, 2, mix_seed(seed, 18))
    return GraphData.of(graphs, label_counts=(4,)).with_labels(flipped)


def _molecule(y: int, generator: np.random.Generator) -> Graph:
    rings = int(generator.integers(1, 4))
    pairs = [(i, (i + 1) % 6) for i in range(6)]
    free = 6
    for ring in range(1, rings):  # shares the edge that lies across the one shared with the ring before
        a, b = (3, 4) if ring == 1 else (free - 3, free - 2)
        fresh = list(range(free, free + 4))
        pairs += [(a, fresh[0]), *itertools.pairwise(fresh), (fresh[-1], b)]
        free += 4
    labels = [CARBON] * free
    degrees = np.bincount(np.array(pairs).ravel())
    sites = generator.permutation((degrees == 2).nonzero()[0])
    extra = [SUBSTITUENTS[int(generator.integers(len(SUBSTITUENTS)))] for _ in range(int(generator.integers(0, 3)))]
    for site, group in zip(sites.tolist(), [NITRO if y else AMIDE, *extra], strict=False):
        first = len(labels)
        for label, parent in group:
            pairs.append((site if parent < 0 else first + parent, len(labels)))
            labels.append(label)
    edges = np.array(pairs).T
    return Graph(labels, np.concatenate([edges, edges[::-1]], 1), y)
