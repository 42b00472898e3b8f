from __future__ import annotations

import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from limbeck.core.errors import InputError
from limbeck.tasks.planetoid import read_planetoid

# Six nodes: 0 and 1 labelled in training, 2 and 3 further known ones, 5 and 4 tested, in this order; 6 in no file.
FEATURES = np.arange(12, dtype=np.float32).reshape(6, 2)
CLASSES = np.eye(3, dtype=np.int32)[[0, 1, 2, 0, 1, 2]]
TESTED = [5, 4]


def write(folder: Path, **changed: Any) -> Path:
    raw = folder / "Tiny" / "raw"
    raw.mkdir(parents=True)
    neighbours = defaultdict(list, {0: [1, 1], 1: [0], 2: [2, 5], 5: [2], 6: []})
    parts: dict[str, Any] = {
        "x": scipy.sparse.csr_matrix(FEATURES[:2]),
        "allx": scipy.sparse.csr_matrix(FEATURES[:4]),
        "tx": scipy.sparse.csr_matrix(FEATURES[TESTED]),
        "y": CLASSES[:2],
        "ally": CLASSES[:4],
        "ty": CLASSES[TESTED],
        "graph": neighbours,
        **changed,
    }
    for name, part in parts.items():
        (raw / f"ind.tiny.{name}").write_bytes(part if isinstance(part, bytes) else pickle.dumps(part, protocol=2))
    (raw / "ind.tiny.test.index").write_text("".join(f"{n}\n" for n in TESTED))
    return raw.parent


def test_rows_go_to_the_nodes_that_the_index_names(tmp_path: Path) -> None:
    x, y, edges, split = read_planetoid(write(tmp_path))
    np.testing.assert_array_equal(x[:6], FEATURES)
    assert y.tolist() == [0, 1, 2, 0, 1, 2, -1] and not x[6].any()
    assert sorted(map(tuple, edges.T.tolist())) == [(0, 1), (0, 1), (1, 0), (2, 2), (2, 5), (5, 2)]
    assert {k: v.tolist() for k, v in split.items()} == {"train": [0, 1], "val": [2, 3], "test": [4, 5]}


class Evil:
    def __reduce__(self) -> Any:
        return (exec, ("import os; os.environ['LIMBECK_TEST_EVIL'] = '1'",))


def test_nothing_but_arrays_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIMBECK_TEST_EVIL", raising=False)
    folder = write(tmp_path, graph=Evil())
    with pytest.raises(InputError, match=r"ind\.tiny\.graph: a file of arrays asks for .*exec: refused") as caught:
        read_planetoid(folder)
    import os

    assert "LIMBECK_TEST_EVIL" not in os.environ and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"graph": b"no pickle"}, "damaged or no file of Planetoid"),
        ({"x": FEATURES}, "holds no sparse matrix"),
        ({"y": [1, 2]}, "holds no table of classes"),
        ({"ally": CLASSES[:3]}, "numbers of rows differ"),
        ({"graph": [1]}, "no lists of neighbours"),
        ({"graph": {0: ["a"]}}, "no node number"),
        ({"graph": {0: [-3]}}, "but there are"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        read_planetoid(write(tmp_path, **changed))
    assert "ind.tiny" in str(caught.value) and "\n" not in str(caught.value)


def test_a_matrix_whose_parts_do_not_fit_is_refused(tmp_path: Path) -> None:
    broken = scipy.sparse.csr_matrix(FEATURES[:2])
    broken.indices[0] = 99
    with pytest.raises(InputError, match="parts do not fit"):
        read_planetoid(write(tmp_path, x=broken))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "raw" / "ind.tiny.ty").unlink()
    with pytest.raises(InputError, match=r"no file .*ind\.tiny\.ty"):
        read_planetoid(folder)
    with pytest.raises(InputError, match="of one data set"):
        read_planetoid(tmp_path)
