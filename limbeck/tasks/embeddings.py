"""Tasks of paired embeddings: queries that look for items of a gallery, banks of reference pairs, and where they come from.

``train`` is the bank: what may be learnt from. ``val`` chooses settings, ``test`` is looked at once. Whatever makes embeddings (vocabularies,
projections, ridge regressions, encoders) is fitted to the bank only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.config import Config
from limbeck.core.data import Data
from limbeck.core.errors import InputError, UnknownNameError
from limbeck.metrics.degeneration import degeneration_score
from limbeck.tasks.base import hash_of
from limbeck.tasks.embedding_sources import (
    cones,
    contrastive_digits,
    digits_halves,
    documented_code,
    masked_code,
    split_rows,
    text_file,
)

_HASHED = 4096  # rows that go into a fingerprint: a gallery may be mapped from a file that is larger than memory
PARTS = ("train", "val", "test")


class EmbeddingSetup(Config):
    """Which embeddings, and how they are split."""

    task: str = Field(
        "stdlib-docstrings",
        description="stdlib-docstrings, stdlib-code (names masked, first sentences), digits-halves, digits-contrastive, cones (generated)",
    )
    data: str | None = Field(
        None,
        description="embeddings of your own: an .npz with query and gallery (or train_query, train_gallery, val_…, test_…), a folder with query.npy and gallery.npy, or texts as .jsonl or .parquet",
    )
    train_size: int | None = Field(None, ge=2, description="pairs of the bank; none: what the task has")
    val_size: int | None = Field(None, ge=2, description="pairs that settings are chosen on; none: what the task has")
    test_size: int | None = Field(None, ge=2, description="pairs that are judged; none: what the task has")
    dimensions: int = Field(100, ge=1, description="of text embeddings (TF-IDF and truncated SVD)")
    cone: float = Field(1.0, ge=0, description="length of the common part of generated embeddings")
    split_seed: int = Field(0, ge=0, description="seeds which pairs go where, and what is generated")


class EmbeddingPairs(Data):
    """Queries and a gallery.

    A batch has queries (B, D) as inputs and their ids (B,) as labels.

    Args:
        query: (Q, D), an array or tensor, perhaps mapped from a file. gallery: (N, D).
        query_ids, gallery_ids: integers (Q,) and (N,): a query looks for the items with its id. None: query i for item i.

    Attributes:
        targets: (Q,), the place of the item that each query looks for; None where ids are not unique in the gallery.

    Raises:
        InputError: shapes that do not fit, or a query that looks for nothing.
    """

    def __init__(self, query: Any, gallery: Any, query_ids: Any = None, gallery_ids: Any = None) -> None:
        self.query, self.gallery = _matrix(query, "query"), _matrix(gallery, "gallery")
        if self.query.shape[1] != self.gallery.shape[1]:
            raise InputError(
                f"queries have {self.query.shape[1]} dimensions and the gallery {self.gallery.shape[1]}: both must be of one space"
            )
        if query_ids is None and gallery_ids is None and len(self.query) != len(self.gallery):
            raise InputError(
                f"{len(self.query)} queries and {len(self.gallery)} items are no pairs: give query_ids and gallery_ids"
            )
        self.query_ids = _ids(query_ids, len(self.query), "query_ids")
        self.gallery_ids = _ids(gallery_ids, len(self.gallery), "gallery_ids")
        lost = ~torch.isin(self.query_ids, self.gallery_ids)
        if bool(lost.any()):
            raise InputError(f"query {int(lost.nonzero()[0])} looks for an id that no item of the gallery has")
        values, order = self.gallery_ids.sort()
        several = bool((values[1:] == values[:-1]).any())
        self.targets = None if several else order[torch.searchsorted(values, self.query_ids)]

    def __len__(self) -> int:
        return len(self.query)

    def fetch(self, index: Tensor, view: int | None) -> Batch:
        return Batch(self.query[index], self.query_ids[index], index, view)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((tuple(self.query.shape), tuple(self.gallery.shape))).encode())
        for part in (self.query[:_HASHED], self.gallery[:_HASHED], self.query_ids, self.gallery_ids):
            digest.update(hash_of(part.contiguous()).encode())
        return digest.hexdigest()[:16]

    def subset(self, index: Tensor) -> EmbeddingPairs:
        """Pairs by number; only of data in which query i looks for item i."""
        return EmbeddingPairs(self.query[index], self.gallery[index])


@dataclass
class EmbeddingTask:
    """Banks, validation and test pairs of one embedding space.

    Attributes:
        name: what it is called.
        train: reference pairs: the banks.
        val, test: disjoint from them and from each other.
        source: where the data came from, for the record.
        class_names: none; retrieval has no classes.
    """

    name: str
    train: EmbeddingPairs
    val: EmbeddingPairs
    test: EmbeddingPairs
    source: str = ""
    class_names: list[str] | None = None

    def __post_init__(self) -> None:
        widths = {part.gallery.shape[1] for part in (self.train, self.val, self.test)}
        if len(widths) > 1:
            raise InputError(f"bank, validation and test embeddings have different dimensions: {sorted(widths)}")

    @property
    def fingerprint(self) -> str:
        return self.train.fingerprint()

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "source": self.source,
            "bank": [len(self.train.query), len(self.train.gallery)],
            "val": [len(self.val.query), len(self.val.gallery)],
            "test": [len(self.test.query), len(self.test.gallery)],
            "dimensions": self.test.gallery.shape[1],
            "bank_mean_cosine": round(degeneration_score(self.train.gallery), 4),
            "fingerprint": self.fingerprint,
        }


Sizes = tuple[int, int, int]
_SOURCES: Mapping[str, tuple[Callable[[EmbeddingSetup, Sizes], tuple[list[Any], str]], Sizes]] = {
    "stdlib-docstrings": (lambda s, n: documented_code(n, s.dimensions, s.split_seed), (2400, 800, 800)),
    "stdlib-code": (lambda s, n: masked_code(n, s.dimensions, s.split_seed), (2400, 800, 800)),
    "digits-halves": (lambda s, n: digits_halves(n, s.split_seed), (900, 300, 597)),
    "digits-contrastive": (lambda s, n: contrastive_digits(n, s.split_seed), (900, 300, 597)),
    "cones": (lambda s, n: cones(n, s.cone, s.split_seed), (1500, 500, 500)),
}


def load_embeddings(setup: EmbeddingSetup) -> EmbeddingTask:
    """A task by name, or from ``setup.data``.

    Raises:
        UnknownNameError: no such task.
        InputError: more pairs asked for than there are, or a file that is not what it should be.
    """
    if setup.data is not None:
        return _own(Path(setup.data).expanduser(), setup)
    if setup.task not in _SOURCES:
        raise UnknownNameError(
            "task", setup.task, _SOURCES, hint=f"Known: {', '.join(_SOURCES)}; your own embeddings go in with --data."
        )
    make, sizes = _SOURCES[setup.task]
    parts, source = make(setup, _asked(setup, sizes))
    return _made(setup.task, [EmbeddingPairs(*part) for part in parts], source)


def embedding_tasks() -> list[str]:
    return list(_SOURCES)


# ---- a user's own ----------------------------------------------------------------------------------------------------


def _own(path: Path, setup: EmbeddingSetup) -> EmbeddingTask:
    if path.suffix in (".jsonl", ".ndjson", ".parquet"):
        parts, source = text_file(path, lambda n: _asked(setup, _thirds(n)), setup.dimensions, setup.split_seed)
        return _made(path.stem, [EmbeddingPairs(*part) for part in parts], source)
    arrays = read_arrays(path)
    for name, rows in arrays.items():
        _finite(rows, f"{name} of {path}")
    if {"query", "gallery"} <= arrays.keys():
        whole = EmbeddingPairs(arrays["query"], arrays["gallery"])
        sizes = _asked(setup, _thirds(len(whole)))
        ids = split_rows(len(whole), sizes, setup.split_seed)
        return _made(path.stem, [whole.subset(part) for part in ids], str(path))
    wanted = [f"{part}_{side}" for part in PARTS for side in ("query", "gallery")]
    missing = [name for name in wanted if name not in arrays]
    if missing:
        raise InputError(
            f"{path} lacks {', '.join(missing[:2])}: it needs query and gallery (row i belongs to row i), or {', '.join(wanted)}"
        )
    made = [
        EmbeddingPairs(*(arrays.get(f"{part}_{key}") for key in ("query", "gallery", "query_ids", "gallery_ids")))
        for part in PARTS
    ]
    return _made(path.stem, made, str(path))


def read_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of an .npz, or of all .npy files of a folder, which are mapped rather than read. Nothing is unpickled.

    Raises:
        InputError: nothing of the kind, or a damaged file.
    """
    try:
        if path.is_dir():
            return {f.stem: np.load(f, mmap_mode="c", allow_pickle=False) for f in sorted(path.glob("*.npy"))}
        if path.suffix == ".npz" and path.is_file():
            with np.load(path, allow_pickle=False) as stored:
                return dict(stored.items())
    except (ValueError, OSError, EOFError):
        raise InputError(f"{path} cannot be read as numpy arrays: it is damaged, or holds Python objects") from None
    raise InputError(
        f"{path} holds no embeddings: give an .npz file, a folder with query.npy and gallery.npy, or texts as .jsonl or .parquet"
    )


def _made(name: str, parts: list[EmbeddingPairs], source: str) -> EmbeddingTask:
    train, val, test = parts
    return EmbeddingTask(name, train, val, test, source)


def _asked(setup: EmbeddingSetup, sizes: Sizes) -> Sizes:
    train, val, test = (
        size if asked is None else asked
        for asked, size in zip((setup.train_size, setup.val_size, setup.test_size), sizes, strict=True)
    )
    return train, val, test


def _thirds(count: int) -> Sizes:
    """Three fifths for the bank, a fifth each for the rest."""
    if count < 10:
        raise InputError(f"{count} pairs are too few to be split in three: give 10 or more")
    fifth = count // 5
    return count - 2 * fifth, fifth, fifth


def _matrix(rows: Any, what: str) -> Tensor:
    if isinstance(rows, np.ndarray) and rows.dtype.kind in "fiu":
        rows = torch.from_numpy(rows if rows.flags.writeable else np.array(rows))
    if not isinstance(rows, Tensor) or rows.ndim != 2 or 0 in rows.shape:
        raise InputError(f"{what} must be a matrix of numbers with one embedding a row")
    return rows if rows.is_floating_point() else rows.float()


def _finite(rows: np.ndarray[Any, Any], what: str) -> None:
    """Complain about NaN and infinity; some rows at a time, since an array may be mapped from a large file."""
    for start in range(0, len(rows) if rows.ndim == 2 and rows.dtype.kind == "f" else 0, _HASHED):
        bad = np.flatnonzero(~np.isfinite(rows[start : start + _HASHED]).all(1))
        if len(bad):
            raise InputError(f"{what} holds NaN or infinity (first in row {start + int(bad[0])}): clean it first")


def _ids(ids: Any, count: int, what: str) -> Tensor:
    if ids is None:
        return torch.arange(count)
    found = torch.as_tensor(np.asarray(ids))
    if found.shape != (count,) or found.is_floating_point():
        raise InputError(f"{what} must be {count} integers, one for each row")
    return found.long()
