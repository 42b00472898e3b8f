"""Decompositions of many filtrations, as a scikit-learn transformer, with a store on disk."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self
from zipfile import BadZipFile

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from torch import Tensor

from limbeck.blocks.interval_summands import IntervalSummands
from limbeck.blocks.module_approximation import Backend, decompose
from limbeck.blocks.multifiltrations import Multifiltration
from limbeck.core.errors import InputError
from limbeck.core.files import atomic_path


class Decomposer(TransformerMixin, BaseEstimator):
    """Filtrations -> candidate decompositions (:func:`~limbeck.blocks.module_approximation.decompose`); it learns nothing.

    Args:
        degrees: of homology.
        lines: how many the barcode is followed along.
        box: two corners that the lines cover, the same for all samples; None: [0, 1]^n, where
            :class:`~limbeck.blocks.filtration_builder.FiltrationBuilder` puts the training set's values.
        collapse: leave out edges that change no homology.
        backend: ``auto``, ``multipers`` or ``fibered``.
        store: a folder that keeps decompositions (npz without pickles), found again by the filtration's content and the settings.
        n_jobs: threads, as joblib takes them.
    """

    def __init__(
        self,
        degrees: Sequence[int] = (0, 1),
        *,
        lines: int = 120,
        box: Any = None,
        collapse: bool = True,
        backend: Backend = "auto",
        store: str | Path | None = None,
        n_jobs: int | None = 1,
    ) -> None:
        self.degrees = degrees
        self.lines = lines
        self.box = box
        self.collapse = collapse
        self.backend = backend
        self.store = store
        self.n_jobs = n_jobs

    def fit(self, X: Any, y: Any = None) -> Self:
        """Nothing is learnt."""
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def transform(self, X: Sequence[Multifiltration]) -> list[IntervalSummands]:
        """A decomposition for every filtration.

        Raises:
            InputError: something else than filtrations, or settings out of range.
        """
        from joblib import Parallel, delayed

        wrong = next((x for x in X if not isinstance(x, Multifiltration)), None)
        if wrong is not None:
            raise InputError(f"a {type(wrong).__name__} is no filtration: put a FiltrationBuilder before")
        jobs = (delayed(self._one)(filtration) for filtration in X)
        return list(Parallel(n_jobs=self.n_jobs, prefer="threads")(jobs))

    def _one(self, filtration: Multifiltration) -> IntervalSummands:
        path = None if self.store is None else Path(self.store) / f"{self._key(filtration)}.npz"
        known = None if path is None else read_summands(path)
        if known is not None:
            return known
        box = self.box if self.box is not None else (np.zeros(filtration.parameters), np.ones(filtration.parameters))
        found = decompose(
            filtration,
            degrees=tuple(self.degrees),
            lines=self.lines,
            box=box,
            collapse=self.collapse,
            backend=self.backend,
        )
        if path is not None:
            write_summands(found, path)
        return found

    def _key(self, filtration: Multifiltration) -> str:
        box = None if self.box is None else np.asarray(self.box, dtype=np.float64).tolist()
        settings = (list(self.degrees), self.lines, box, self.collapse, self.backend, filtration.clique_dimension)
        digest = hashlib.sha256(json.dumps(settings, default=int).encode())
        for part in (*filtration.cells, *filtration.values):
            digest.update(f"{part.dtype}{part.shape}".encode() + np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()[:32]


def write_summands(summands: IntervalSummands, path: Path) -> None:
    """Keep a decomposition as npz, atomically."""
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in summands.tensors().items()}
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def read_summands(path: Path) -> IntervalSummands | None:
    """What :func:`write_summands` kept; None if it is not there or damaged. Nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as found:
            return IntervalSummands.from_tensors({name: found[name] for name in found.files})
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None


def join_summands(modules: Sequence[IntervalSummands]) -> dict[str, Tensor]:
    """Many decompositions over the same parameters as flat tensors: those of one, and ``module_ptr`` (modules + 1,)."""
    counts = [len(m) for m in modules]
    parts = [m.tensors() for m in modules]
    joined = {
        name: torch.cat([p[name] for p in parts]) if parts else torch.zeros(0)
        for name in ("births", "deaths", "degrees")
    }
    for name in ("birth_ptr", "death_ptr"):
        sizes = [p[name].diff() for p in parts]
        joined[name] = torch.cat([torch.zeros(1, dtype=torch.int64), *sizes]).cumsum(0)
    return {**joined, "module_ptr": torch.tensor([0, *counts]).cumsum(0)}


def split_summands(joined: Mapping[str, Any]) -> list[IntervalSummands]:
    """What :func:`join_summands` put together."""
    ends = torch.as_tensor(joined["module_ptr"]).tolist()
    if len(ends) == 1:
        return []
    every = IntervalSummands.from_tensors(joined)
    return [every.chosen(torch.arange(a, b)) for a, b in itertools.pairwise(ends)]
