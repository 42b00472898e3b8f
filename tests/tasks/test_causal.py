from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from limbeck.core.errors import InputError, UnknownNameError
from limbeck.tasks.causal import BUNDLED, CausalSetup, load_causal


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_generated_models_are_seeded_and_divided() -> None:
    task = load_causal(CausalSetup(nodes=6, edges_per_node=1.5, samples=40))
    assert (len(task.train), len(task.val), len(task.test)) == (40, 20, 40) and task.train.inputs.shape == (40, 6)
    assert task.truth is not None and (task.truth != 0).sum() == 9 and task.class_names == []
    assert task.describe()["edges"] == 9 and task.describe()["fingerprint"] == task.fingerprint
    assert task.fingerprint == load_causal(CausalSetup(nodes=6, edges_per_node=1.5, samples=40)).fingerprint
    assert task.fingerprint != load_causal(CausalSetup(nodes=6, edges_per_node=1.5, samples=40, sem_seed=1)).fingerprint


def test_standardised_columns_have_variance_one() -> None:
    task = load_causal(CausalSetup(nodes=5, edges_per_node=1, samples=60, standardise=True))
    np.testing.assert_allclose(task.train.inputs.numpy().std(0), 1)
    np.testing.assert_allclose(task.train.inputs.numpy().mean(0), 0, atol=1e-12)
    assert "standardised" in task.name


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_tables(name: str) -> None:
    task = load_causal(CausalSetup(task=name))
    total = len(task.train) + len(task.val) + len(task.test)
    assert total == {"diabetes": 442, "wine": 178, "breast-cancer": 569}[name] and task.truth is None
    assert task.train.inputs.shape[1] == len(task.names) and "edges" not in task.describe()


def test_a_table_of_ones_own_with_its_graph(tmp_path: Path) -> None:
    rows = "\n".join(f"{i},{2 * i + i % 3},{-i}" for i in range(20))
    data = write(tmp_path / "own.csv", "rain,wet,sun\n" + rows)
    edges = write(tmp_path / "edges.csv", "from,to\nrain,wet\nsun,rain\n")
    task = load_causal(CausalSetup(data=data, truth=edges))
    assert task.names == ["rain", "wet", "sun"] and task.name == "own" and len(task.train) == 14
    assert task.truth is not None and set(zip(*np.nonzero(task.truth), strict=True)) == {(0, 1), (2, 0)}
    matrix = write(tmp_path / "matrix.csv", "node,sun,rain,wet\nwet,0,0,0\nsun,0,1.5,0\nrain,0,0,1\n")
    other = load_causal(CausalSetup(data=data, truth=matrix)).truth
    assert other is not None and other[2, 0] == 1.5 and np.array_equal(other != 0, task.truth != 0)
    plain = write(tmp_path / "plain.csv", "rain,wet,sun\n0,1,0\n0,0,0\n1,0,0\n")
    third = load_causal(CausalSetup(data=data, truth=plain)).truth
    assert third is not None and np.array_equal(third != 0, task.truth != 0)


def test_wrong_tables_are_one_clear_line(tmp_path: Path) -> None:
    data = write(tmp_path / "own.csv", "a,b\n" + "\n".join(f"{i},{i * i % 7}" for i in range(9)))
    for text, words in (
        ("a,b\n1,2\n3,x\n4,5\n5,6\n", "column 'b' of 'bad.csv' has no finite number in row 2"),
        ("a,b\n1,2\n,3\n4,5\n5,6\n", "column 'a' .* row 2"),
        ("a,b\n", "no rows"),
        ("a,b\n1,2\n3,4\n", "has 2 rows"),
    ):
        with pytest.raises(InputError, match=words):
            load_causal(CausalSetup(data=write(tmp_path / "bad.csv", text)))
    for text, words in (
        ("from,to\na,z\n", "row 1 .* 'z', which is no column"),
        ("from,to\na,b\nb,a\n", "has a cycle"),
        ("a,b,c\n0,1,0\n", "no graph of 2 variables"),
        ("node,a,b\na,0,1\na,0,0\n", "rows of 'graph.csv' are not named"),
    ):
        with pytest.raises(InputError, match=words):
            load_causal(CausalSetup(data=data, truth=write(tmp_path / "graph.csv", text)))
    with pytest.raises(InputError, match="no file"):
        load_causal(CausalSetup(data=str(tmp_path / "none.csv")))
    with pytest.raises(InputError, match="--truth is the graph of a table"):
        load_causal(CausalSetup(truth=data))
    with pytest.raises(UnknownNameError, match="did you mean sem"):
        load_causal(CausalSetup(task="sems"))
