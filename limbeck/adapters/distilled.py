"""Distilled data sets as parquet files in the layout of 🤗 ``datasets``, and back."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.core.artifacts import DESCRIPTION
from limbeck.core.distilled import DistilledDataset
from limbeck.core.errors import RunError
from limbeck.core.files import atomic_path, read_json, write_json

PARQUET = "data/train-00000-of-00001.parquet"
SHEET = "sheet.png"
_PLAIN = ("num_classes", "kind", "bits", "factor", "extra_bytes")


def save_distilled(
    dataset: DistilledDataset, folder: Path, description: Mapping[str, Any], sheet: bytes | None = None
) -> None:
    """Write a folder that ``datasets.load_dataset(folder)`` and :func:`limbeck.load` read.

    Columns: ``image`` (PNG; 8-bit images with 1 or 3 channels) or ``values`` (an array in the stored precision), ``label`` (class
    index), ``soft_label`` (probabilities, where there are any), ``index`` (which real sample, for a selection).

    Args:
        dataset: what to write; values are rounded as its ``bits`` say.
        folder: created if needed.
        description: goes into ``artifact.json``.
        sheet: a PNG that shows the images.
    """
    import datasets

    n = len(dataset)
    names = list(dataset.class_names) or [str(c) for c in range(dataset.num_classes)]
    columns: dict[str, Any] = {"label": dataset.hard_labels.tolist()}
    features: dict[str, Any] = {"label": datasets.ClassLabel(names=names)}
    low, high = dataset.scale()
    if _as_png(dataset):
        columns["image"] = [{"bytes": _png(c), "path": None} for c in dataset.codes().cpu()]
        features["image"] = datasets.Image()
    else:
        values = dataset.codes() if dataset.bits == 8 else dataset.inputs
        kind = {8: "uint8", 16: "float16", 32: "float32"}[dataset.bits]
        columns["values"] = values.cpu().numpy().astype(kind).reshape(n, -1).tolist()
        features["values"] = datasets.Sequence(datasets.Value(kind), length=values[0].numel())
    if dataset.soft:
        columns["soft_label"] = dataset.labels.half().cpu().numpy().tolist()
        features["soft_label"] = datasets.Sequence(datasets.Value("float16"), length=dataset.num_classes)
    if dataset.index is not None:
        columns["index"] = dataset.index.tolist()
        features["index"] = datasets.Value("int64")
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    with atomic_path(folder / PARQUET) as temporary, without_bars():
        table.to_parquet(str(temporary))
    if sheet is not None:
        with atomic_path(folder / SHEET) as temporary:
            temporary.write_bytes(sheet)
    about = {
        "kind": "dataset",
        **description,
        "nbytes": dataset.nbytes,
        "dataset": {
            **{name: getattr(dataset, name) for name in _PLAIN},
            "shape": list(dataset.inputs.shape[1:]),
            "mean": list(dataset.mean),
            "std": list(dataset.std),
            "low": low.tolist(),
            "high": high.tolist(),
            "class_names": names,
            "recipe": dict(dataset.recipe),
        },
    }
    write_json(folder / DESCRIPTION, about)


@contextmanager
def without_bars() -> Iterator[None]:
    """No progress bar for a few rows."""
    import datasets

    off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not off:
            datasets.enable_progress_bars()


def read_distilled(folder: Path, description: Mapping[str, Any]) -> DistilledDataset:
    """The data set that :func:`save_distilled` wrote.

    Raises:
        RunError: files are missing or do not belong together.
    """
    import pyarrow.parquet as pq
    from pyarrow.lib import ArrowException

    about = description.get("dataset")
    if about is None:
        raise RunError(f"{folder / DESCRIPTION} describes no distilled data set")
    try:
        table = pq.read_table(folder / PARQUET)
    except FileNotFoundError:
        raise RunError(f"{folder / PARQUET} is missing: the distilled data set is not complete") from None
    except (ArrowException, OSError) as error:
        raise RunError(f"{folder / PARQUET} is no parquet file or is damaged ({str(error).splitlines()[0]})") from None
    columns, shape = set(table.column_names), tuple(about["shape"])
    if "label" not in columns or not columns & {"image", "values"}:
        raise RunError(f"{folder / PARQUET} has no columns 'label' and 'image' or 'values'")
    low, high = torch.tensor(about["low"]), torch.tensor(about["high"])
    if "image" in columns:
        codes = np.stack([_decode(cell["bytes"]) for cell in table["image"].to_pylist()])
    else:
        codes = np.array(table["values"].to_pylist()).reshape(-1, *shape)
    labels: Any = table["soft_label" if "soft_label" in columns else "label"].to_pylist()
    found = DistilledDataset(
        inputs=torch.from_numpy(codes.astype(np.float32)),
        labels=torch.tensor(labels, dtype=torch.float32 if "soft_label" in columns else torch.int64),
        mean=about["mean"],
        std=about["std"],
        index=torch.tensor(table["index"].to_pylist()) if "index" in columns else None,
        recipe=about["recipe"],
        class_names=about["class_names"],
        **{name: about[name] for name in _PLAIN},
    )
    if tuple(found.inputs.shape[1:]) != shape:
        raise RunError(f"{folder / PARQUET} has samples of shape {tuple(found.inputs.shape[1:])}, not {shape}")
    if found.bits == 8:
        found.inputs = found.decode(found.inputs, low, high)
    return found


def read(folder: Path, description: Mapping[str, Any], **options: Any) -> DistilledDataset:
    """The reader of this kind for :func:`limbeck.load`."""
    if options:
        raise RunError(f"a distilled data set is loaded without options (got {', '.join(options)})")
    return read_distilled(folder, description or read_json(folder / DESCRIPTION))


def _as_png(dataset: DistilledDataset) -> bool:
    return dataset.kind == "images" and dataset.bits == 8 and dataset.inputs.shape[1] in (1, 3)


def _png(image: Tensor) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    array = image.numpy().transpose(1, 2, 0)
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(buffer, "PNG")
    return buffer.getvalue()


def _decode(png: bytes) -> np.ndarray[Any, Any]:
    from PIL import Image

    array = np.asarray(Image.open(io.BytesIO(png)))
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
