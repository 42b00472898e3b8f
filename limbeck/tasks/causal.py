"""Tasks of causal order: samples of a structural model whose graph is known, or a table with or without a graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from limbeck.blocks.acyclicity import FloatArray
from limbeck.blocks.dags import is_dag
from limbeck.core.config import Config
from limbeck.core.data import TensorData, mix_seed
from limbeck.core.errors import InputError, UnknownNameError
from limbeck.tasks.base import hash_of
from limbeck.tasks.structural_models import Graph, Mechanism, Noise, random_dag, random_weights, simulate

BUNDLED = ("diabetes", "wine", "breast-cancer")
HELD_OUT = 0.15
"""Share of a table's rows that goes into each of validation and testing."""


class CausalSetup(Config):
    """Which data, and what is known about its graph."""

    task: str = Field(
        "sem",
        description=f"sem (generated), {', '.join(BUNDLED)} (real tables, graph unknown), or any name that --data explains",
    )
    data: str | None = Field(
        None, description="a table of your own (.csv, .tsv or .parquet) with a named column for each variable"
    )
    truth: str | None = Field(
        None,
        description="the true graph of that table, where it is known: a square table (row → column, named as the data's columns), or two columns of names, one row per edge",
    )
    graph: Graph = Field("er", description="generated graph: er (uniform), sf (scale-free), bipartite")
    nodes: int = Field(20, ge=1, le=2000, description="variables of a generated model")
    edges_per_node: float = Field(4.0, ge=0, description="edges of a generated graph, per node")
    mechanism: Mechanism = Field(
        "linear", description="how parents act: linear, logistic (zeros and ones), mlp, mim, gp (nonlinear)"
    )
    noise: Noise = Field("gaussian", description="law of the noise")
    noise_scale: float = Field(1.0, gt=0, description="its scale")
    samples: int = Field(1000, ge=2, description="training samples of a generated model; testing has as many again")
    standardise: bool = Field(
        False, description="bring every column to variance 1, so that its scale tells nothing about the order"
    )
    sem_seed: int = Field(0, ge=0, description="seeds the generated model, or the split of a table")


@dataclass
class CausalTask:
    """Samples in three parts, and the graph where it is known.

    Attributes:
        name: what it is called.
        train, val, test: (n, d) float64 samples without labels.
        names: of the variables.
        truth: (d, d) weights of the true graph (its edges alone, where weights are unknown), or None.
        source: where it came from.
        class_names: none; variables are no classes.
    """

    name: str
    train: TensorData
    val: TensorData
    test: TensorData
    names: list[str]
    truth: FloatArray | None = None
    source: str = ""
    class_names: list[str] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        return hash_of(self.train.inputs, *([] if self.truth is None else [self.truth]))

    def describe(self) -> dict[str, Any]:
        edges = {} if self.truth is None else {"edges": int((self.truth != 0).sum())}
        return {
            "name": self.name,
            "source": self.source,
            "train": len(self.train),
            "val": len(self.val),
            "test": len(self.test),
            "variables": len(self.names),
            **edges,
            "fingerprint": self.fingerprint,
        }


def load_causal(setup: CausalSetup) -> CausalTask:
    """The task that a setup names.

    Raises:
        InputError: it does not exist, cannot be read, or does not fit together.
    """
    if setup.data is not None:
        names, values = read_table(Path(setup.data).expanduser())
        truth = None if setup.truth is None else read_graph(Path(setup.truth).expanduser(), names)
        return _divided(Path(setup.data).stem, names, values, truth, str(setup.data), setup)
    if setup.truth is not None:
        raise InputError("--truth is the graph of a table: name the table with --data")
    if setup.task in BUNDLED:
        return _bundled(setup)
    if setup.task != "sem":
        raise UnknownNameError("task", setup.task, ("sem", *BUNDLED), hint="Your own table goes in with --data.")
    return generated(setup)


def generated(setup: CausalSetup) -> CausalTask:
    """A structural model drawn with ``sem_seed``."""
    generator = np.random.default_rng(mix_seed(setup.sem_seed, 811))
    dag = random_dag(setup.graph, setup.nodes, round(setup.nodes * setup.edges_per_node), generator)
    weights = random_weights(dag, generator)
    held = max(2, setup.samples // 2)
    values = simulate(
        weights,
        2 * setup.samples + held,
        generator,
        mechanism=setup.mechanism,
        noise=setup.noise,
        scale=setup.noise_scale,
    )
    parts = np.split(values, [setup.samples, setup.samples + held])
    name = f"{setup.mechanism} {setup.graph} {setup.nodes}"
    names = [f"x{i}" for i in range(setup.nodes)]
    truth = weights if setup.mechanism in ("linear", "logistic") else dag
    return _task(name, names, parts, truth, f"generated, {setup.noise} noise", setup.standardise)


def read_table(path: Path) -> tuple[list[str], FloatArray]:
    """Names (d) and values (n, d) of a table of numbers.

    Raises:
        InputError: no such file, not readable, text or gaps in it.
    """
    frame = _frame(path)
    numbers = []
    for name in frame.columns:
        column = _numbers(frame[name])
        wrong = np.flatnonzero(~np.isfinite(column))
        if len(wrong):
            raise InputError(
                f"column '{name}' of '{path.name}' has no finite number in row {wrong[0] + 1} ('{frame[name].iloc[wrong[0]]}'): fill it or drop it"
            )
        numbers.append(column)
    return [str(name) for name in frame.columns], np.stack(numbers, 1)


def read_graph(path: Path, names: list[str]) -> FloatArray:
    """A true graph (d, d): a square table with or without a first column of names, or two columns of names with one row per edge.

    Raises:
        InputError: neither, unknown names, or a cycle.
    """
    frame = _frame(path)
    columns = [str(c) for c in frame.columns]
    labelled = len(columns) == len(names) + 1 and set(columns[1:]) == set(names)
    found = np.zeros((len(names), len(names)))
    if labelled or (len(columns) == len(names) == len(frame) and set(columns) == set(names)):
        rows = [str(v) for v in frame.iloc[:, 0]] if labelled else columns
        if sorted(rows) != sorted(names):
            raise InputError(f"the rows of '{path.name}' are not named as the data's columns: name each once")
        matrix = np.stack([_numbers(frame[name]) for name in frame.columns[labelled:]], 1)
        place = [names.index(row) for row in rows], [names.index(column) for column in columns[labelled:]]
        found[np.ix_(*place)] = matrix
    elif len(columns) == 2:
        for row, (tail, head) in enumerate(frame.astype(str).itertuples(index=False), 1):
            if tail not in names or head not in names:
                strange = tail if tail not in names else head
                raise InputError(f"row {row} of '{path.name}' names '{strange}', which is no column of the data")
            found[names.index(tail), names.index(head)] = 1.0
    else:
        raise InputError(
            f"'{path.name}' is no graph of {len(names)} variables: give a square table named as the data's columns, or two columns of names"
        )
    if not np.isfinite(found).all() or not is_dag(found):
        raise InputError(f"the graph in '{path.name}' has a cycle or gaps: give a DAG")
    return found


def _bundled(setup: CausalSetup) -> CausalTask:
    from sklearn import datasets

    read = {
        "diabetes": datasets.load_diabetes,
        "wine": datasets.load_wine,
        "breast-cancer": datasets.load_breast_cancer,
    }
    found = read[setup.task](as_frame=True, **({"scaled": False} if setup.task == "diabetes" else {}))
    frame = found.frame if setup.task == "diabetes" else found.data
    names = [str(c) for c in frame.columns]
    return _divided(setup.task, names, frame.to_numpy(np.float64), None, "bundled with scikit-learn", setup)


def _divided(
    name: str, names: list[str], values: FloatArray, truth: FloatArray | None, source: str, setup: CausalSetup
) -> CausalTask:
    """A table in three parts."""
    count = len(values)
    held = max(1, round(HELD_OUT * count))
    if count - 2 * held < 2:
        raise InputError(f"'{name}' has {count} rows: at least 4 are needed")
    order = np.random.default_rng(mix_seed(setup.sem_seed, 812)).permutation(count)
    parts = np.split(values[order], [count - 2 * held, count - held])
    return _task(name, names, parts, truth, source, setup.standardise)


def _task(
    name: str, names: list[str], parts: list[FloatArray], truth: FloatArray | None, source: str, standardise: bool
) -> CausalTask:
    if standardise:
        mean, deviation = parts[0].mean(0), parts[0].std(0)
        scale = np.where(deviation > 0, deviation, 1.0)
        parts = [(part - mean) / scale for part in parts]
        name = f"{name}, standardised"
    train, val, test = (TensorData(torch.from_numpy(np.ascontiguousarray(part))) for part in parts)
    return CausalTask(name, train, val, test, names, truth, source)


def _frame(path: Path) -> Any:
    import pandas

    if not path.is_file():
        raise InputError(f"no file '{path}': give a .csv, .tsv or .parquet file")
    try:
        if path.suffix.lower() == ".parquet":
            frame = pandas.read_parquet(path)
        else:
            frame = pandas.read_csv(path, sep="\t" if path.suffix.lower() == ".tsv" else ",", skipinitialspace=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"cannot read '{path}' as a table ({type(error).__name__}: {reason})") from error
    if not len(frame) or not len(frame.columns):
        raise InputError(f"'{path}' has no rows or no columns")
    return frame


def _numbers(column: Any) -> FloatArray:
    import pandas

    found: FloatArray = pandas.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    return found
