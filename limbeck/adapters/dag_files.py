"""DAGs on disk: an .npz of numpy arrays without pickles, and GraphML that networkx, igraph and Gephi read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from limbeck.blocks.acyclicity import FloatArray, IntArray
from limbeck.blocks.dags import to_networkx
from limbeck.core.artifacts import DESCRIPTION, register_kind
from limbeck.core.errors import RunError
from limbeck.core.files import atomic_path, write_json

if TYPE_CHECKING:
    import networkx

ARRAYS, GRAPH = "dag.npz", "graph.graphml"


def write_dag(
    folder: Path,
    adjacency: FloatArray,
    order: IntArray,
    names: Sequence[str],
    weights: FloatArray | None = None,
    description: Mapping[str, Any] | None = None,
) -> None:
    """Write a DAG artifact.

    Args:
        folder: created if needed.
        adjacency: (d, d) weights of the edges that count.
        order: (d,) the order that was found.
        names: of the variables.
        weights: (d, d) all weights along the order.
        description: goes into ``artifact.json``.
    """
    import networkx

    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"adjacency": adjacency, "order": order, "names": np.array(names, dtype=np.str_)}
    with atomic_path(folder / ARRAYS) as path, open(path, "wb") as file:
        np.savez(file, **arrays, **({} if weights is None else {"weights": weights}))  # type: ignore[arg-type]
    with atomic_path(folder / GRAPH) as path:
        networkx.write_graphml(to_networkx(adjacency, names), path)
    write_json(folder / DESCRIPTION, {"kind": "dag", **(description or {}), "edges": int((adjacency != 0).sum())})


def read_dag(folder: Path, description: Mapping[str, Any] | None = None) -> networkx.DiGraph:
    """The graph of an artifact, nodes in the order that was found, with edges' ``weight``.

    Raises:
        RunError: no such file, or damaged.
    """
    try:
        with np.load(Path(folder) / ARRAYS, allow_pickle=False) as found:
            adjacency, order, names = found["adjacency"], found["order"], found["names"].tolist()
    except FileNotFoundError:
        raise RunError(f"{Path(folder) / ARRAYS} does not exist: is the folder a DAG artifact?") from None
    except (ValueError, KeyError, OSError, EOFError) as error:
        raise RunError(f"{Path(folder) / ARRAYS} is damaged ({type(error).__name__})") from None
    return to_networkx(adjacency[np.ix_(order, order)], [names[i] for i in order.tolist()])


register_kind("dag", read_dag)
