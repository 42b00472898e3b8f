from __future__ import annotations

from pathlib import Path

import networkx
import numpy as np
import pytest

from limbeck.adapters.dag_files import read_dag, write_dag
from limbeck.core.artifacts import load
from limbeck.core.errors import RunError


def test_a_dag_comes_back_without_pickles(tmp_path: Path) -> None:
    weights = np.zeros((3, 3))
    weights[2, 0], weights[0, 1] = 1.5, -0.5
    write_dag(tmp_path, weights, np.array([2, 0, 1]), ["a", "b", "c"], weights, {"method": "x"})
    artifact = load(tmp_path)
    assert list(artifact.content) == ["c", "a", "b"] and artifact.content["c"]["a"]["weight"] == 1.5
    assert artifact.description["edges"] == 2 and artifact.description["method"] == "x"
    foreign = networkx.read_graphml(tmp_path / "graph.graphml")
    assert set(foreign.edges) == {("c", "a"), ("a", "b")}
    (tmp_path / "dag.npz").write_bytes(b"nothing")
    with pytest.raises(RunError, match="damaged"):
        read_dag(tmp_path)
    (tmp_path / "dag.npz").unlink()
    with pytest.raises(RunError, match="does not exist"):
        read_dag(tmp_path)
