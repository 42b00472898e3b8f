"""Distilled data sets of graphs as parquet files in the layout of 🤗 ``datasets``, and back.

The columns are those that graph data sets on the Hub have: ``num_nodes``, ``node_feat`` (label columns of each node), ``edge_index``
(sources, destinations), ``edge_attr`` (a label for each edge, where there are any) and ``y`` (the class); and, where they are,
``frequency``, ``root`` (the nodes that a readout goes over), ``root_weight`` and ``degree``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.adapters.distilled import PARQUET, SHEET, without_bars
from limbeck.core.artifacts import DESCRIPTION
from limbeck.core.distilled_graphs import DistilledGraphs
from limbeck.core.errors import InputError, RunError
from limbeck.core.files import atomic_path, write_json
from limbeck.core.graphs import Graph, GraphData


def save_distilled_graphs(
    dataset: DistilledGraphs, folder: Path, description: Mapping[str, Any], sheet: bytes | None = None
) -> None:
    """Write a folder that ``datasets.load_dataset(folder)`` and :func:`limbeck.load` read.

    Args:
        dataset: what to write.
        folder: created if needed.
        description: goes into ``artifact.json``.
        sheet: a PNG that shows the items.
    """
    import datasets

    many = datasets.Sequence(datasets.Value("int32"))
    kinds: dict[str, Any] = {
        "num_nodes": datasets.Value("int32"),
        "node_feat": datasets.Sequence(many),
        "edge_index": datasets.Sequence(many),
        "edge_attr": datasets.Sequence(many),
        "y": many,
        "frequency": datasets.Value("int64"),
        "root": many,
        "root_weight": datasets.Sequence(datasets.Value("float32")),
        "degree": many,
    }
    rows = [_row(dataset, number) for number in range(len(dataset))]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features({name: kinds[name] for name in columns}))
    with atomic_path(folder / PARQUET) as temporary, without_bars():
        table.to_parquet(str(temporary))
    if sheet is not None:
        with atomic_path(folder / SHEET) as temporary:
            temporary.write_bytes(sheet)
    graphs = dataset.graphs
    about = {
        "num_classes": dataset.num_classes,
        "sampling": dataset.sampling,
        "class_counts": list(dataset.class_counts),
        "hops": dataset.hops,
        "class_names": list(dataset.class_names),
        "recipe": dict(dataset.recipe),
        "label_counts": list(graphs.label_counts),
        "edge_label_count": graphs.edge_label_count,
        "centroids": None if graphs.centroids is None else graphs.centroids.tolist(),
    }
    write_json(
        folder / DESCRIPTION, {"kind": "graph-dataset", **description, "nbytes": dataset.nbytes, "dataset": about}
    )


def _row(dataset: DistilledGraphs, number: int) -> dict[str, Any]:
    graph = dataset.graphs.graph(number)
    row: dict[str, Any] = {
        "num_nodes": len(graph.node_labels),
        "node_feat": graph.node_labels.tolist(),
        "edge_index": graph.edge_index.tolist(),
        "y": [graph.y],
    }
    if graph.edge_labels is not None:
        row["edge_attr"] = graph.edge_labels[:, None].tolist()
    if dataset.frequency is not None:
        row["frequency"] = int(dataset.frequency[number])
    if graph.root_mask is not None:
        row["root"] = graph.root_mask.nonzero().flatten().tolist()
        if graph.node_weights is not None:
            row["root_weight"] = graph.node_weights[graph.root_mask].tolist()
    if graph.degrees is not None:
        row["degree"] = graph.degrees.tolist()
    return row


def read(folder: Path, description: Mapping[str, Any]) -> DistilledGraphs:
    """The data set that :func:`save_distilled_graphs` wrote.

    Raises:
        RunError: files are missing, damaged, or do not belong together.
    """
    import pyarrow.parquet as pq
    from pyarrow.lib import ArrowException

    about = description.get("dataset")
    path = folder / PARQUET
    if about is None:
        raise RunError(f"{folder / DESCRIPTION} describes no distilled data set")
    try:
        rows = pq.read_table(path).to_pylist()
    except FileNotFoundError:
        raise RunError(f"{path} is missing: the distilled data set is not complete") from None
    except (ArrowException, OSError) as error:
        raise RunError(f"{path} is no parquet file or is damaged ({str(error).splitlines()[0]})") from None
    try:
        graphs = GraphData.of(
            [_graph(row) for row in rows],
            label_counts=about["label_counts"],
            edge_label_count=about["edge_label_count"],
            centroids=None if about["centroids"] is None else torch.tensor(about["centroids"]),
        )
        found = torch.tensor([row["frequency"] for row in rows]) if "frequency" in rows[0] else None
        return DistilledGraphs(
            graphs,
            about["num_classes"],
            found,
            about["sampling"],
            about["class_counts"],
            about["hops"],
            about["class_names"],
            about["recipe"],
        )
    except KeyError as error:
        raise RunError(f"{path} or {DESCRIPTION} lacks {error}: they do not belong to a distilled data set") from None
    except InputError as error:
        raise RunError(f"{path} does not hold the data set that {DESCRIPTION} describes: {error}") from None


def _graph(row: Mapping[str, Any]) -> Graph:
    size = row["num_nodes"]
    root: Tensor | None = None
    weights: Tensor | None = None
    if "root" in row:
        root = torch.zeros(size, dtype=torch.bool)
        root[row["root"]] = True
        if "root_weight" in row:
            weights = torch.zeros(size)
            weights[row["root"]] = torch.tensor(row["root_weight"])
    attributes = row.get("edge_attr")
    return Graph(
        torch.tensor(row["node_feat"]).reshape(size, -1),
        torch.tensor(row["edge_index"], dtype=torch.int64).reshape(2, -1),
        row["y"][0],
        None if attributes is None else torch.tensor(attributes, dtype=torch.int64).flatten(),
        root_mask=root,
        node_weights=weights,
        degrees=row.get("degree"),
    )
