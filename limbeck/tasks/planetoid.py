"""The raw files of Planetoid (``ind.NAME.{x,y,tx,ty,allx,ally,graph,test.index}``), read without running what is in them.

Six of the files are pickles. :class:`ArraysOnly` admits numpy arrays and what Python keeps them in; anything else in a file is refused before it is
called, and scipy's matrices come as their plain parts, which are checked.
"""

from __future__ import annotations

import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
from numpy.typing import NDArray

from limbeck.core.errors import InputError


class _Matrix:
    """Stands for scipy's csr_matrix: its state is kept as it comes."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def dense(self, path: Path) -> NDArray[np.float32]:
        state = getattr(self, "state", None)
        state = state if isinstance(state, dict) else {}
        shape = state.get("_shape", state.get("shape"))
        data, indices, indptr = (state.get(name) for name in ("data", "indices", "indptr"))
        whole = all(isinstance(part, np.ndarray) for part in (data, indices, indptr))
        if data is None or indices is None or indptr is None or not whole or not isinstance(shape, tuple):
            raise InputError(f"{path} holds no sparse matrix in rows")
        return rows_of(data, indices, indptr, shape, path)


def _bytes(text: str, encoding: str = "latin1") -> bytes:
    """Whatever encoding a file asks for, it gets this one."""
    return text.encode("latin1")


class ArraysOnly(pickle.Unpickler):
    """Reads pickles of numpy arrays, lists and dictionaries, and nothing else.

    Raises:
        InputError: a file names any other class or function.
    """

    _ADMITTED: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("_codecs", "encode"): _bytes,  # how Python 3 writes bytes for Python 2
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("collections", "defaultdict"): defaultdict,
        ("__builtin__", "list"): list,
        ("builtins", "list"): list,
        ("scipy.sparse.csr", "csr_matrix"): _Matrix,
        ("scipy.sparse._csr", "csr_matrix"): _Matrix,
    }

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ADMITTED:
            raise InputError(f"a file of arrays asks for {module}.{name}: refused, since only arrays are read")
        return self._ADMITTED[module, name]


def read_planetoid(
    folder: Path,
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64], dict[str, NDArray[np.int64]]]:
    """A citation graph from its raw files.

    Args:
        folder: holds ``ind.*`` files of one data set, or has them in ``raw``.

    Returns:
        features (N, F), labels (N,) with -1 for nodes without one, edges (2, E) as listed (one direction or both, with repetitions), and the public
        split's node numbers by part.

    Raises:
        InputError: a file is missing, damaged, holds more than arrays, or does not fit the others.
    """
    where = folder / "raw" if (folder / "raw").is_dir() else folder
    stems = sorted(p.name.removesuffix(".graph") for p in where.glob("ind.*.graph"))
    if len(stems) != 1:
        raise InputError(f"{where} must hold the files ind.NAME.x, .y, … of one data set; it holds {len(stems)}")
    stem = stems[0]
    features = {part: _matrix(where / f"{stem}.{part}") for part in ("x", "tx", "allx")}
    classes = {part: _one_hot(where / f"{stem}.{part}") for part in ("y", "ty", "ally")}
    neighbours = _pickled(where / f"{stem}.graph")
    tested = _numbers(where / f"{stem}.test.index")
    known = len(features["allx"])
    if len(tested) != len(features["tx"]) or len(classes["ty"]) != len(tested) or len(classes["ally"]) != known:
        raise InputError(f"the files {stem}.* do not fit each other: numbers of rows differ")
    edges, listed = _edges(neighbours, where / f"{stem}.graph")
    nodes = max(known, int(tested.max()) + 1, listed)
    if edges.size and (edges.min() < 0 or edges.max() >= nodes):
        raise InputError(f"{stem}.graph names node {int(edges.max())}, but there are {nodes}")
    if int(tested.min()) < known:
        raise InputError(f"{stem}.test.index names a node of {stem}.allx")
    x = np.zeros((nodes, features["allx"].shape[1]), np.float32)
    y = np.full(nodes, -1, np.int64)
    # Nodes that no file describes (CiteSeer has 15) keep features of 0 and no label.
    x[:known], x[tested] = features["allx"], features["tx"]
    y[:known], y[tested] = classes["ally"], classes["ty"]
    train = len(features["x"])
    split = {"train": np.arange(train), "val": np.arange(train, min(train + 500, known)), "test": np.sort(tested)}
    return x, y, edges, split


def rows_of(
    data: NDArray[Any], indices: NDArray[Any], indptr: NDArray[Any], shape: tuple[Any, ...], path: Path
) -> NDArray[np.float32]:
    """A dense matrix from compressed rows that may be wrong.

    Raises:
        InputError: they are.
    """
    height, width = (int(n) for n in shape)
    fits = (
        data.ndim == indices.ndim == indptr.ndim == 1
        and len(indptr) == height + 1
        and len(data) == len(indices) == indptr[-1]
        and indptr[0] == 0
        and (np.diff(indptr) >= 0).all()
        and (not len(indices) or (indices.min() >= 0 and indices.max() < width))
        and np.isfinite(data).all()
    )
    if not fits:
        raise InputError(f"{path} holds a sparse matrix whose parts do not fit")
    found = np.zeros((height, width), np.float32)
    np.add.at(found, (np.repeat(np.arange(height), np.diff(indptr)), indices), data.astype(np.float32))
    return found


def _pickled(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            return ArraysOnly(file).load()
    except FileNotFoundError:
        raise InputError(f"no file {path}: the raw files of Planetoid belong together") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path} is damaged or no file of Planetoid ({type(error).__name__}: {reason})") from None


def _matrix(path: Path) -> NDArray[np.float32]:
    held = _pickled(path)
    if not isinstance(held, _Matrix):
        raise InputError(f"{path} holds no sparse matrix")
    return held.dense(path)


def _one_hot(path: Path) -> NDArray[np.int64]:
    held = _pickled(path)
    if not isinstance(held, np.ndarray) or held.ndim != 2 or held.dtype.kind not in "iuf":
        raise InputError(f"{path} holds no table of classes")
    return np.where(held.any(1), held.argmax(1), -1).astype(np.int64)


def _numbers(path: Path) -> NDArray[np.int64]:
    try:
        return np.array(path.read_text().split(), dtype=np.int64)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} must hold one node number in each line ({type(error).__name__})") from None


def _edges(neighbours: Any, path: Path) -> tuple[NDArray[np.int64], int]:
    """Edges (2, E) from lists of neighbours, and how many nodes the lists' owners tell of."""
    if not isinstance(neighbours, dict) or not neighbours:
        raise InputError(f"{path} holds no lists of neighbours")
    try:
        sources = np.fromiter(neighbours, np.int64, len(neighbours))
        sizes = np.array([len(v) for v in neighbours.values()], np.int64)
        targets = np.concatenate([np.asarray(v, np.int64) for v in neighbours.values()])
    except (TypeError, ValueError):
        raise InputError(f"{path} holds something that is no node number") from None
    return np.stack([np.repeat(sources, sizes), targets]), int(sources.max()) + 1
