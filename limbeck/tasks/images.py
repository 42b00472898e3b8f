"""Image classification from files: MNIST, CIFAR-10, and any data set that 🤗 ``datasets`` can open.

Images are decoded once into uint8 arrays, which are kept in the cache folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from limbeck.core.data import TensorData
from limbeck.core.errors import InputError
from limbeck.core.files import atomic_path
from limbeck.tasks.augment import ShiftFlip
from limbeck.tasks.base import (
    Task,
    TaskConfig,
    cache_folder,
    channel_statistics,
    data_root,
    flip_labels,
    hash_of,
    stratified_order,
    take,
)

MAX_BYTES = 4 << 30  # decoded images beyond this are refused rather than swapped


def load_mnist(config: TaskConfig) -> Task:
    """MNIST from ``<data root>/mnist``: 55,000 training, 5,000 validation, 10,000 test images, (1, 28, 28)."""
    return _known(config, "mnist", val=5000, shift=2, flip=False, student="cnn-w8-s3", teacher="cnn-w32-s3", epochs=4)


def load_cifar10(config: TaskConfig) -> Task:
    """CIFAR-10 from ``<data root>/cifar10``: 45,000 training, 5,000 validation, 10,000 test images, (3, 32, 32)."""
    return _known(config, "cifar10", val=5000, shift=4, flip=True, student="resnet8", teacher="resnet20", epochs=15)


def load_any(config: TaskConfig) -> Task:
    """Images with class labels from a folder or a Hugging Face data set's name (``config.data``).

    A folder may hold parquet files (``train*.parquet``, ``test*.parquet``) or images in one folder per class. A tenth of the
    training part becomes the validation part; where there is no test part, a fifth becomes one.
    """
    assert config.data is not None
    splits, classes = _open(config.data, config.image_size)
    train = splits["train"]
    test = splits.get("test") or splits.get("validation")
    order = stratified_order(train[1], 0)
    if test is None:
        cut = max(1, len(order) // 5)
        test = (train[0][order[:cut]], train[1][order[:cut]])
        order = order[cut:]
    val = max(1, len(order) // 10)
    name = Path(config.data).name if Path(config.data).exists() else config.data
    return _assemble(config, name, train, test, order, val, classes, config.data, 2, False, {}, 30)


def _known(
    config: TaskConfig, name: str, *, val: int, shift: int, flip: bool, student: str, teacher: str, epochs: float
) -> Task:
    root = data_root(config)
    if root is None:
        raise InputError(
            f"task '{name}' needs its data: give the folder that holds {name}/ with --data-root or LIMBECK_DATA, "
            f"or use any source with --data (a folder, or a Hugging Face name such as '{_HUB[name]}')"
        )
    if not (root / name).is_dir():
        raise InputError(f"no folder {name}/ in {root}: it should hold train.parquet and test.parquet")
    splits, classes = _open(str(root / name), config.image_size)
    if "test" not in splits:
        raise InputError(f"{root / name} has no test part: it should hold train.parquet and test.parquet")
    train, test = splits["train"], splits["test"]
    networks = {"student": student, "teacher": teacher}
    order = stratified_order(train[1], 0)
    return _assemble(config, name, train, test, order, val, classes, f"{name} (parquet)", shift, flip, networks, epochs)


_HUB = {"mnist": "ylecun/mnist", "cifar10": "uoft-cs/cifar10"}


def _assemble(
    config: TaskConfig,
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    order: Tensor,
    val: int,
    classes: list[str],
    source: str,
    shift: int,
    flip: bool,
    networks: dict[str, str],
    epochs: float,
) -> Task:
    held, rest = order[:val], order[val:]
    ids = rest[take(train[1][rest], config.train_size, config.split_seed)]
    mean, std = channel_statistics(train[0][ids])
    labels = flip_labels(train[1][ids], config.label_noise, len(classes), config.split_seed)
    augment = ShiftFlip(shift, flip) if config.augment else None
    return Task(
        name=name,
        train=TensorData(train[0][ids], labels, mean=mean, std=std, augment=augment, seed=config.split_seed),
        val=TensorData(train[0][held], train[1][held], mean=mean, std=std),
        test=TensorData(*test, mean=mean, std=std),
        num_classes=len(classes),
        in_shape=tuple(train[0].shape[1:]),
        class_names=classes,
        networks=networks or {"student": "cnn-w8-s3", "teacher": "cnn-w32-s3"},
        teacher_epochs=epochs,
        source=source,
    )


def _open(where: str, size: int | None) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
    """Decoded splits and class names, from the cache where possible."""
    path = Path(where).expanduser()
    key = _content_key(path) if path.exists() else None
    cached = None if key is None else cache_folder() / "images" / f"{hash_of(key, size)}.safetensors"
    if cached is not None and cached.exists():
        import json

        from safetensors import safe_open

        with safe_open(cached, "pt") as file:
            classes = json.loads(file.metadata()["classes"])
        stored = load_file(cached)
        names = {n.split("/")[0] for n in stored}
        return {n: (stored[f"{n}/images"], stored[f"{n}/labels"]) for n in names}, classes
    splits, classes = _decode_all(_load_dataset(where, path), where, size)
    if cached is not None:
        import json

        flat = {f"{n}/{k}": t for n, pair in splits.items() for k, t in zip(("images", "labels"), pair, strict=True)}
        with atomic_path(cached) as temporary:
            save_file(flat, temporary, metadata={"classes": json.dumps(classes)})
    return splits, classes


def _content_key(path: Path) -> list[tuple[str, int, int]]:
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def _load_dataset(where: str, path: Path) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        if path.is_dir():
            parquet = sorted(path.glob("**/*.parquet"))
            if parquet:
                parts: dict[str, list[str]] = {}
                for file in parquet:
                    stem = file.stem.lower()
                    part = next((p for p in ("test", "valid", "train") if p in stem), "train")
                    parts.setdefault("validation" if part == "valid" else part, []).append(str(file))
                return datasets.load_dataset("parquet", data_files=parts)
            if not any(p.is_file() for p in path.rglob("*")):
                raise InputError(f"{path} holds no files: expected parquet files, or images in one folder per class")
            return datasets.load_dataset("imagefolder", data_dir=str(path))
        if path.is_file():
            return datasets.load_dataset("parquet", data_files={"train": [str(path)]})
        return datasets.load_dataset(where)
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"cannot open '{where}' as a data set of images ({type(error).__name__}: {reason})") from error


def _decode_all(dataset: Any, where: str, size: int | None) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
    import datasets

    if "train" not in dataset:
        raise InputError(f"'{where}' has no training part (it has: {', '.join(dataset)})")
    features = dataset["train"].features
    image = next((n for n in ("image", "img", "picture", "pixel_values") if n in features), None)
    label = next((n for n in ("label", "labels", "fine_label", "class", "target") if n in features), None)
    if image is None or label is None:
        raise InputError(f"'{where}' needs an image and a label column (it has: {', '.join(features)})")
    splits: dict[str, tuple[Tensor, Tensor]] = {}
    for name, part in dataset.items():
        if name not in ("train", "test", "validation"):
            continue
        if len(part) == 0:
            raise InputError(f"the {name} part of '{where}' is empty")
        part = part.cast_column(image, datasets.Image())
        labels = np.asarray(part[label])
        if labels.dtype.kind not in "iu":
            raise InputError(
                f"labels in column '{label}' of '{where}' are {labels.dtype}, not integers: encode the classes"
            )
        splits[name] = (_decode(part[image], where, size), torch.from_numpy(labels.astype(np.int64)))
    known = getattr(features[label], "names", None)
    count = max(int(pair[1].max()) for pair in splits.values()) + 1
    if min(int(pair[1].min()) for pair in splits.values()) < 0:
        raise InputError(f"'{where}' has negative labels: number the classes from 0")
    if count < 2:
        raise InputError(f"'{where}' has one class only: classification needs at least two")
    return splits, [str(c) for c in known] if known else [str(c) for c in range(count)]


def _decode(column: Any, where: str, size: int | None) -> Tensor:
    """Images of one column as uint8 (N, C, H, W)."""
    arrays = []
    total = 0
    shape: tuple[int, ...] | None = None
    for number, picture in enumerate(column):
        if size is not None:
            picture = picture.resize((size, size))
        picture = picture if picture.mode in ("L", "RGB") else picture.convert("RGB")
        array = np.asarray(picture, dtype=np.uint8)
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        if shape is None:
            shape = array.shape
        elif array.shape != shape:
            raise InputError(
                f"images of mixed sizes in '{where}': number {number} is {array.shape}, the first is {shape}; "
                "give one size with --image-size"
            )
        total += array.nbytes
        if total > MAX_BYTES:
            raise InputError(f"'{where}' decodes to more than {MAX_BYTES >> 30} GiB: use a smaller --image-size")
        arrays.append(array)
    return torch.from_numpy(np.ascontiguousarray(np.stack(arrays)))  # stacking keeps the channels-last strides
