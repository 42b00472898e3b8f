"""The artifact of topological representations: vectors, decompositions and the fitted transformer, without pickles.

A folder with ``features.npz`` (by part the vectors (samples, columns), and ``PART_labels``), ``decompositions.npz`` (all samples, parts in
order, :func:`~limbeck.blocks.decomposer.join_summands`) and ``artifact.json`` (settings and boxes of the transformer).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from limbeck.blocks.decomposer import join_summands, split_summands
from limbeck.blocks.decomposition_images import DecompositionTransformer
from limbeck.blocks.interval_summands import IntervalSummands
from limbeck.core.artifacts import DESCRIPTION, register_kind
from limbeck.core.errors import RunError
from limbeck.core.files import atomic_path, write_json

KIND = "representations"


@dataclass(frozen=True)
class Representations:
    """What the artifact holds.

    Attributes:
        transformer: fitted; it takes further decompositions.
        features: by part (samples, columns).
        labels: by part (samples,).
        decompositions: of all samples, parts in the order of ``features``.
    """

    transformer: DecompositionTransformer
    features: Mapping[str, NDArray[np.float64]]
    labels: Mapping[str, NDArray[np.int64]]
    decompositions: Sequence[IntervalSummands]


def write_representations(found: Representations, folder: Path, description: Mapping[str, Any]) -> None:
    """Write the folder; ``description`` goes into ``artifact.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {**found.features, **{f"{part}_labels": y for part, y in found.labels.items()}}
    joined: dict[str, Any] = {name: value.numpy() for name, value in join_summands(found.decompositions).items()}
    for name, content in (("features.npz", arrays), ("decompositions.npz", joined)):
        with atomic_path(folder / name) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **content)
    plain = int | float | str | tuple | bool
    settings = {k: v for k, v in found.transformer.get_params().items() if isinstance(v, plain)}
    settings["power"] = str(settings["power"])  # infinity is no number in JSON
    about = {
        "kind": KIND,
        "settings": settings,
        "boxes": found.transformer.boxes_.tolist(),
        "parts": list(found.features),
    }
    write_json(folder / DESCRIPTION, {**description, **about})


def read_representations(folder: Path, description: Mapping[str, Any]) -> Representations:
    """What :func:`write_representations` wrote.

    Raises:
        RunError: a file is missing or damaged.
    """
    try:
        settings = dict(description["settings"])
        made = DecompositionTransformer(**{**settings, "power": float(settings["power"])})
        made.boxes_ = np.asarray(description["boxes"], dtype=np.float64)
        made.n_features_out_ = len(made.boxes_) * made.resolution ** made.boxes_.shape[2]
        parts = description["parts"]
        with np.load(folder / "features.npz", allow_pickle=False) as kept:
            features = {part: kept[part] for part in parts}
            labels = {part: kept[f"{part}_labels"] for part in parts}
        with np.load(folder / "decompositions.npz", allow_pickle=False) as kept:
            modules = split_summands(kept)
    except (OSError, KeyError, ValueError, TypeError, EOFError, BadZipFile) as error:
        raise RunError(
            f"{folder} holds no representations or is damaged ({' '.join(str(error).split())[:120]})"
        ) from None
    return Representations(made, features, labels, modules)


register_kind(KIND, read_representations)
