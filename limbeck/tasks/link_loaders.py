"""The graphs of links by name: generated, MATLAB matrices, citation graphs, and files of one's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.tasks.graph_files import ArrayFile, data_folder
from limbeck.tasks.link_generators import CLOSURE_NODES, GROWING_NODES, closure_communities, growing
from limbeck.tasks.links import LinkSetup, LinkTask

_FILES = {"usair": "USAir", "celegans": "Celegans", "yeast": "Yeast", "power": "Power", "ecoli": "Ecoli"}


def load_closure(setup: LinkSetup) -> LinkTask:
    """Communities that differ in how often a link closes a triangle; see :func:`~limbeck.tasks.link_generators.closure_communities`."""
    links, features, _ = closure_communities(setup.generated_nodes or CLOSURE_NODES, seed=setup.split_seed)
    return _split(
        setup, "closure", links, len(features), features, "seeded communities with triangle closure", ordered=True
    )


def load_growing(setup: LinkSetup) -> LinkTask:
    """A graph whose late links leave its communities; see :func:`~limbeck.tasks.link_generators.growing`. Nodes have no features."""
    links, community = growing(setup.generated_nodes or GROWING_NODES, seed=setup.split_seed)
    return _split(setup, "growing", links, len(community), None, "seeded growing graph", ordered=True)


def load_matrix(setup: LinkSetup) -> LinkTask:
    """One of the graphs ``links/NAME.mat``, without features."""
    path = data_folder(setup.task, setup.data_root, "links") / "links" / f"{_FILES[setup.task]}.mat"
    links, size = read_mat(path)
    return _split(setup, setup.task, links, size, None, f"{path.stem} (links/{path.name})")


def load_citations(setup: LinkSetup) -> LinkTask:
    """Citations of Cora or CiteSeer, with the words of the abstracts."""
    from limbeck.tasks.node_classification import NodeSetup, load_nodes

    graph = load_nodes(NodeSetup.make(task=setup.task, data_root=setup.data_root)).graph
    return _split(setup, setup.task, graph.edge_index, graph.num_nodes, graph.features, f"{setup.task} (Planetoid)")


def load_own(setup: LinkSetup) -> LinkTask:
    """A graph of one's own; ``.npz`` files may also hold ``x`` (N, F), ``times`` (E,) and ``sides`` (N,)."""
    assert setup.data is not None
    path = Path(setup.data).expanduser()
    if not path.is_file():
        raise InputError(f"no file {path}: links are a .mat, .npz or text file")
    features = times = sides = None
    if path.suffix == ".mat":
        links, size = read_mat(path)
    elif path.suffix == ".npz":
        held = ArrayFile(path)
        links = held.numbers("edge_index", whole=True)
        features = held.numbers("x").float() if "x" in held else None
        times = held.numbers("times") if "times" in held else None
        sides = held.numbers("sides", whole=True) if "sides" in held else None
        given = features if features is not None else sides
        size = len(given) if given is not None else int(links.max()) + 1 if links.numel() else 0
    else:
        try:
            links = torch.from_numpy(np.loadtxt(path, dtype=np.int64, usecols=(0, 1), ndmin=2).T.copy())
        except (ValueError, IndexError) as error:
            reason = " ".join(str(error).split())[:100]
            raise InputError(f"{path} must hold two node numbers in each line ({reason})") from None
        size = int(links.max()) + 1 if links.numel() else 0
    return _split(
        setup, path.stem, links, size, features, str(path), ordered=path.suffix != ".mat", times=times, sides=sides
    )


def read_mat(path: Path) -> tuple[Tensor, int]:
    """Links (2, E) and the number of nodes of a MATLAB file with a square sparse matrix ``net``.

    Raises:
        InputError: no such file, or nothing of the kind in it.
    """
    from scipy.io import loadmat
    from scipy.sparse import coo_matrix

    if not path.is_file():
        raise InputError(f"no file {path}")
    try:
        held = loadmat(path, variable_names=["net"])
        net = coo_matrix(held["net"])
    except KeyError:
        raise InputError(f"{path} holds no matrix 'net'") from None
    except Exception as error:  # scipy raises whatever its parser meets
        reason = " ".join(str(error).split())[:100]
        raise InputError(f"{path} is no MATLAB file that can be read ({type(error).__name__}: {reason})") from None
    if net.shape[0] != net.shape[1]:
        raise InputError(f"{path} holds a matrix of {net.shape[0]} x {net.shape[1]}: an adjacency is square")
    there = net.data != 0
    return torch.from_numpy(np.stack([net.row[there], net.col[there]]).astype(np.int64)), net.shape[0]


def _split(
    setup: LinkSetup,
    name: str,
    links: Tensor,
    size: int,
    features: Tensor | None,
    source: str,
    *,
    ordered: bool = False,
    times: Tensor | None = None,
    sides: Tensor | None = None,
) -> LinkTask:
    if setup.split == "time" and not ordered:
        raise InputError(f"the links of '{name}' have no order: split them at random")
    return LinkTask.from_edges(
        links,
        size,
        features=features,
        times=times,
        split=setup.split,
        val_share=setup.val_share,
        test_share=setup.test_share,
        seed=setup.split_seed,
        name=name,
        source=source,
        sides=sides,
    )
