"""Classification of table rows: scikit-learn's wine and breast-cancer data, Adult, and any CSV or parquet file.

Numbers are standardised with the training rows' mean and standard deviation; every other column becomes one indicator (0 or 1)
for each value that the training rows hold. A missing text ("?" or empty) is a value of its own, a missing number an error. A
value that only appears outside the training rows has all indicators 0. Settings that are about images (``augment``,
``image_size``) change nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from limbeck.core.data import TensorData
from limbeck.core.errors import InputError, UnknownNameError
from limbeck.tasks.base import Task, TaskConfig, data_root, flip_labels, stratified_order, take

if TYPE_CHECKING:
    from pandas import DataFrame

TEST, VAL = (
    0.25,
    0.15,
)  # parts of a table that comes in one piece; of a known training part VAL_OF_TRAIN is for validation
VAL_OF_TRAIN = 0.1
FEWEST_ROWS = 3  # of each class, so that every part can have one
MOST_VALUES = 500  # of a text column: more of them look like names or keys, and would drown the rest
LABEL_COLUMNS = ("label", "target", "class", "y")
ADULT_COLUMNS = [
    "age",
    "workclass",
    "fnlwgt",
    "education",
    "education-num",
    "marital-status",
    "occupation",
    "relationship",
    "race",
    "sex",
    "capital-gain",
    "capital-loss",
    "hours-per-week",
    "native-country",
    "income",
]


def load_wine(config: TaskConfig) -> Task:
    """178 wines of 3 cultivars, 13 chemical measurements; 60 % for training, 15 % validation, 25 % testing, stratified."""
    from sklearn.datasets import load_wine as read

    return _bundled(config, "wine", read, "scikit-learn's wine (UCI Wine recognition), 178 rows")


def load_breast_cancer(config: TaskConfig) -> Task:
    """569 tumours, malignant or benign, 30 measurements of cell nuclei; 60 % training, 15 % validation, 25 % testing, stratified."""
    from sklearn.datasets import load_breast_cancer as read

    source = "scikit-learn's breast cancer (UCI Breast Cancer Wisconsin, Diagnostic), 569 rows"
    return _bundled(config, "breast-cancer", read, source)


def load_adult(config: TaskConfig) -> Task:
    """Adult (census income above 50,000 dollars or not) from ``<data root>/adult/adult.{data,test}``: 14 columns, 2 classes.

    The files are read as UCI publishes them, or with a line of column names. A tenth of ``adult.data``, stratified, is for
    validation; ``adult.test`` is for testing.
    """
    root = data_root(config)
    if root is None:
        raise InputError(
            "task 'adult' needs its data: give the folder that holds adult/ with --data-root or LIMBECK_DATA"
        )
    frames = {}
    for part, name in (("train", "adult.data"), ("test", "adult.test")):
        path = root / "adult" / name
        if not path.is_file():
            raise InputError(f"no file adult/{name} in {root}: the folder adult/ should hold adult.data and adult.test")
        with open(path, encoding="utf-8", errors="replace") as file:
            named = file.readline().lower().startswith("age,")
        frame = _read(path, header=0 if named else None, names=ADULT_COLUMNS, comment="|")
        frame["income"] = frame["income"].str.rstrip(".")  # the test part ends its labels with a full stop
        frames[part] = frame
    networks = {"student": "mlp-32", "teacher": "mlp-256-256"}
    return _task(config, "adult", frames, "income", "Adult (UCI, census income)", networks, 10)


def load_file(config: TaskConfig) -> Task:
    """A table of one's own: ``config.data`` is a CSV, TSV or parquet file, ``config.label_column`` says what to predict.

    60 % of the rows are for training, 15 % for validation, 25 % for testing, stratified. Without ``label_column`` the first of
    label, target, class, y that is there is taken.
    """
    if config.data is None:
        raise InputError("task 'table' needs a file: give a CSV, TSV or parquet file with --data")
    path = Path(config.data).expanduser()
    if not path.is_file():
        raise InputError(f"no file '{config.data}': --data of task 'table' is a CSV, TSV or parquet file")
    if path.suffix.lower() == ".parquet":
        frame = _read(path)
    else:
        frame = _read(path, sep="\t" if path.suffix.lower() == ".tsv" else ",")
    label = config.label_column or next((name for name in LABEL_COLUMNS if name in frame.columns), None)
    if label is None:
        raise InputError(
            f"'{path.name}' has no column named {', '.join(LABEL_COLUMNS)}: name what to predict with --label-column"
        )
    return _task(
        config, path.stem, {"all": frame}, label, str(path), {"student": "mlp-16", "teacher": "mlp-128-128"}, 60
    )


def _bundled(config: TaskConfig, name: str, read: Callable[..., Any], source: str) -> Task:
    found = read(as_frame=True)
    frame = found.frame.copy()
    frame["target"] = [str(found.target_names[i]) for i in frame["target"]]
    return _task(config, name, {"all": frame}, "target", source, {"student": "mlp-16", "teacher": "mlp-128-128"}, 60)


def _read(path: Path, **options: Any) -> DataFrame:
    """A file as a table; everything in a CSV stays text for now, so that nothing is guessed.

    Raises:
        InputError: it cannot be read, or has no rows.
    """
    import pandas

    try:
        if path.suffix.lower() == ".parquet":
            frame = pandas.read_parquet(path)
        else:
            frame = pandas.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True, **options).fillna("")
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"cannot read '{path}' as a table ({type(error).__name__}: {reason})") from error
    frame = frame.reset_index(drop=True)  # rows are counted in error messages
    frame.columns = [str(name).strip() for name in frame.columns]
    if len(frame) == 0:
        raise InputError(f"'{path}' has no rows")
    return frame


def _task(
    config: TaskConfig,
    name: str,
    frames: Mapping[str, DataFrame],
    label: str,
    source: str,
    networks: Mapping[str, str],
    teacher_epochs: float,
) -> Task:
    """Split, encode and standardise; ``frames`` has ``train`` and ``test``, or ``all``."""
    first = frames.get("train", frames.get("all"))
    assert first is not None
    if label not in first.columns:
        raise UnknownNameError("column", label, first.columns, hint=f"'{name}' has: {', '.join(first.columns[:12])}")
    labels, classes = _labels(frames, label, name)
    columns = [c for c in first.columns if c != label]
    if not columns:
        raise InputError(f"'{name}' has no column besides '{label}': there is nothing to predict it from")
    if "all" in frames:
        order = stratified_order(labels["all"], 0)
        held, tested = round(VAL * len(order)), round(TEST * len(order))
        parts = order[: len(order) - held - tested], order[len(order) - held - tested : len(order) - tested]
        rows = {"train": parts[0], "val": parts[1], "test": order[len(order) - tested :]}
        where = dict.fromkeys(rows, "all")
    else:
        order = stratified_order(labels["train"], 0)
        held = max(1, round(VAL_OF_TRAIN * len(order)))
        rows = {"val": order[:held], "train": order[held:], "test": torch.arange(len(labels["test"]))}
        where = {"val": "train", "train": "train", "test": "test"}
    trained = labels[where["train"]][rows["train"]]
    rows["train"] = rows["train"][take(trained, config.train_size, config.split_seed)]
    trained = labels[where["train"]][rows["train"]]
    if len(torch.unique(trained)) < len(classes):
        raise InputError(
            f"{len(trained)} training rows do not show all {len(classes)} classes: use a larger train_size"
        )
    tables = {part: frames[where[part]][columns].iloc[ids.numpy()] for part, ids in rows.items()}
    encoded, mean, std = _encode(tables, name)
    kept = {part: labels[where[part]][ids] for part, ids in rows.items()}
    kept["train"] = flip_labels(trained, config.label_noise, len(classes), config.split_seed)
    data = {part: TensorData(encoded[part], kept[part], mean=mean, std=std, seed=config.split_seed) for part in rows}
    return Task(
        name=name,
        train=data["train"],
        val=data["val"],
        test=data["test"],
        num_classes=len(classes),
        in_shape=(len(mean),),
        class_names=classes,
        networks=networks,
        teacher_epochs=teacher_epochs,
        source=source,
    )


def _labels(frames: Mapping[str, DataFrame], label: str, name: str) -> tuple[dict[str, Tensor], list[str]]:
    """Class indices of every frame, and the classes: numbers in their order, else texts in theirs."""
    texts = {part: frame[label].astype(str).str.strip().to_numpy() for part, frame in frames.items()}
    first = next(iter(texts.values()))
    classes, counts = np.unique(first, return_counts=True)
    empty = np.isin(first, ("", "nan", "None", "<NA>")).nonzero()[0]
    if len(empty):
        raise InputError(f"column '{label}' of '{name}' has no label in row {empty[0] + 1}: fill it or drop the row")
    if len(classes) < 2:
        raise InputError(f"column '{label}' of '{name}' has one class only: classification needs at least two")
    if counts.min() < FEWEST_ROWS:
        rare = int(counts.argmin())
        raise InputError(
            f"column '{label}' of '{name}' has {len(classes)} classes in {len(first)} rows, of '{classes[rare]}' only "
            f"{counts[rare]}: every class needs {FEWEST_ROWS} (is it a number rather than a class?)"
        )
    try:
        ordered = sorted(classes.tolist(), key=float)
    except ValueError:
        ordered = classes.tolist()
    number = {text: i for i, text in enumerate(ordered)}
    found = {}
    for part, values in texts.items():
        strange = sorted(set(values.tolist()) - set(ordered))
        if strange:
            raise InputError(f"the {part} part of '{name}' has a class '{strange[0]}' that its training part lacks")
        found[part] = torch.tensor([number[v] for v in values.tolist()], dtype=torch.long)
    return found, ordered


def _encode(tables: Mapping[str, DataFrame], name: str) -> tuple[dict[str, Tensor], list[float], list[float]]:
    """Features (N, F) float32 of each part, and each one's mean and deviation over the training rows (0 and 1 for indicators)."""
    train = tables["train"]
    blocks: dict[str, list[np.ndarray]] = {part: [] for part in tables}
    mean: list[float] = []
    std: list[float] = []
    for column in train.columns:
        if _is_number(train[column]):
            for part, table in tables.items():
                blocks[part].append(_numbers(table[column], column, name)[:, None])
            values = blocks["train"][-1].astype(np.float64)
            deviation = float(values.std())
            mean.append(float(values.mean()))
            std.append(deviation if deviation > 1e-12 * max(1.0, abs(mean[-1])) else 1.0)
        else:
            known = np.unique(_texts(train[column]))
            if len(known) > MOST_VALUES:
                raise InputError(
                    f"text column '{column}' of '{name}' has {len(known)} different values (at most {MOST_VALUES}): drop it "
                    "or group them"
                )
            for part, table in tables.items():
                blocks[part].append((_texts(table[column])[:, None] == known[None]).astype(np.float32))
            mean += [0.0] * len(known)
            std += [1.0] * len(known)
    joined = {part: torch.from_numpy(np.concatenate(found, 1).astype(np.float32)) for part, found in blocks.items()}
    return joined, mean, std


def _is_number(column: Any) -> bool:
    """True where every entry that is not missing reads as a number (and there is one)."""
    import pandas

    if pandas.api.types.is_bool_dtype(column):
        return False
    if pandas.api.types.is_numeric_dtype(column):
        return True
    present = column[~np.isin(_texts(column), "?")]
    return len(present) > 0 and bool(pandas.to_numeric(present, errors="coerce").notna().mean() == 1)


def _numbers(column: Any, title: str, name: str) -> np.ndarray:
    import pandas

    values = pandas.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    wrong = (~np.isfinite(values)).nonzero()[0]
    if len(wrong):
        row = int(wrong[0])
        raise InputError(
            f"column '{title}' of '{name}' has no finite number in row {int(column.index[row]) + 1} "
            f"('{column.iloc[row]}'): fill it or drop the row"
        )
    return values.astype(np.float32)


def _texts(column: Any) -> np.ndarray:
    """Texts without spaces around them; whatever is missing is "?"."""
    texts = column.astype(object).where(column.notna(), "?").astype(str).str.strip()
    found: np.ndarray = texts.where(texts != "", "?").to_numpy(dtype=str)
    return found
