"""Arrays of graph files: what is missing or of the wrong kind is named, for graphs of nodes and of links alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from limbeck.core.errors import InputError
from limbeck.tasks.graph_files import ArrayFile, data_folder
from limbeck.tasks.links import LinkSetup, load_links
from limbeck.tasks.node_loaders import read_npz

GOOD: dict[str, Any] = {
    "x": np.eye(4),
    "labels": np.array([0, 1, 0, 1]),
    "edge_index": np.array([[0, 1, 2], [1, 2, 3]]),
}


def write(path: Path, **changes: Any) -> Path:
    np.savez(path, **{name: value for name, value in {**GOOD, **changes}.items() if value is not None})
    return path


def links(path: Path) -> Any:
    return load_links(LinkSetup.make(data=str(path)))


def test_numbers_come_back(tmp_path: Path) -> None:
    held = ArrayFile(write(tmp_path / "g.npz", extra=np.array([0.5])))
    assert set(held) == {*GOOD, "extra"} and len(held) == 4 and "y" not in held
    assert held.numbers("labels", whole=True).tolist() == [0, 1, 0, 1]
    assert held.numbers("extra").dtype == torch.float64
    structure, x, labels = read_npz(held.path)
    assert structure.num_nodes == 4 and x.dtype == torch.float32 and labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("read", [read_npz, links], ids=["nodes", "links"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"edge_index": np.array([[0, 1.5], [1, 2]])}, "array 'edge_index' of .* must hold whole numbers"),
        ({"edge_index": np.array([[0, np.nan], [1, 2]])}, "'edge_index' of .* must hold whole numbers"),
        ({"x": np.array([["a"] * 4] * 4)}, "array 'x' of .* must hold numbers"),
    ],
    ids=["fractions", "nan", "text"],
)
def test_arrays_of_the_wrong_kind_are_named(
    read: Callable[[Path], Any], changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        read(write(tmp_path / "g.npz", **changes))


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="must hold whole numbers"):
        read_npz(write(tmp_path / "labels.npz", labels=np.array([0.5, 1, 0, 1])))
    with pytest.raises(InputError, match="has no array 'labels'; it holds edge_index, x"):
        read_npz(write(tmp_path / "none.npz", labels=None))
    with pytest.raises(InputError, match="has no array 'edge_index'"):
        links(write(tmp_path / "edges.npz", edge_index=None))
    with pytest.raises(InputError, match="no file"):
        read_npz(tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(InputError, match="no .npz file of plain arrays"):
        read_npz(tmp_path / "text.npz")
    monkeypatch.delenv("LIMBECK_DATA", raising=False)
    with pytest.raises(InputError, match="folder that holds planetoid/ with --data-root"):
        data_folder("cora", None, "planetoid")
