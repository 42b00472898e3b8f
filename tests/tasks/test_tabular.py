"""Tables: splits, encoding with training statistics only, own files, and what is wrong with bad ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas
import pytest
import torch

import limbeck
from limbeck.core.errors import InputError, UnknownNameError
from limbeck.fitting import resume
from limbeck.tasks.base import TaskConfig, load_task
from limbeck.tasks.tabular import ADULT_COLUMNS


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LIMBECK_DATA", raising=False)
    torch.set_num_threads(1)


def load(**settings):
    return load_task(TaskConfig(**settings))


@pytest.mark.parametrize(("name", "rows", "features", "classes"), [("wine", 178, 13, 3), ("breast-cancer", 569, 30, 2)])
def test_bundled_tables_are_split_by_class_and_standardised(name, rows, features, classes):
    task = load(task=name)
    parts = (task.train, task.val, task.test)
    assert sum(map(len, parts)) == rows and task.in_shape == (features,) and task.num_classes == classes
    assert len({tuple(r) for part in parts for r in part.inputs.tolist()}) == rows
    overall = torch.bincount(torch.cat([p.labels for p in parts])).double() / rows
    for part in parts:
        assert (torch.bincount(part.labels, minlength=classes) / len(part) - overall).abs().max() < 0.05
    x = task.train.fetch(torch.arange(len(task.train)), 0).inputs
    torch.testing.assert_close(x.mean(0), torch.zeros(features), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(features), atol=1e-3, rtol=0)
    assert task.val.mean == task.train.mean == task.test.mean
    assert load(task=name).fingerprint == task.fingerprint


def test_statistics_are_those_of_the_rows_that_are_used():
    few = load(task="wine", train_size=30)
    expected = few.train.inputs.double().mean(0)
    torch.testing.assert_close(torch.tensor(few.train.mean).double(), expected, rtol=1e-5, atol=1e-5)
    assert few.train.mean != load(task="wine").train.mean
    assert torch.equal(few.test.inputs, load(task="wine").test.inputs)


def test_image_settings_change_nothing_and_noise_and_few_labels_work():
    plain = load(task="wine")
    assert load(task="wine", augment=False, image_size=32).fingerprint == plain.fingerprint
    assert not plain.train.augmented
    noisy = load(task="wine", label_noise=0.2)
    assert int((noisy.train.labels != plain.train.labels).sum()) == round(0.2 * len(plain.train))
    assert len(load(task="wine", labelled=30).train) == 30


ROWS = [
    ["39", "State-gov", "77516", "Bachelors", "13", "Never-married", "Adm-clerical", "Not-in-family", "White", "Male"],
    ["50", "?", "83311", "HS-grad", "9", "Divorced", "Sales", "Husband", "Black", "Female"],
]


def adult(folder: Path, *, header: bool, n: int = 40) -> Path:
    """Files as UCI publishes them (no header, spaces, full stops in the test part), or with a header."""
    (folder / "adult").mkdir(parents=True)
    for part, dot in (("data", ""), ("test", ".")):
        lines = [", ".join(ADULT_COLUMNS)] if header else ["|1x3 Cross validator"] if part == "test" else []
        for i in range(n):
            row = [str(20 + i), *ROWS[i % 2][1:], str(i), "0", "40", "Cuba" if i % 4 else "?"]
            if part == "test" and i == 0:
                row[1] = "Never-worked"  # unknown to the training part
            lines.append(", ".join([*row, (">50K" if i % 4 == 1 else "<=50K") + dot]))
        (folder / "adult" / f"adult.{part}").write_text("\n".join(lines) + "\n\n")
    return folder


@pytest.mark.parametrize("header", [False, True])
def test_adult_is_read_with_and_without_header(tmp_path, header):
    task = load(task="adult", data_root=str(adult(tmp_path, header=header)))
    assert [len(p) for p in (task.train, task.val, task.test)] == [36, 4, 40]
    assert task.class_names == ["<=50K", ">50K"] and task.num_classes == 2
    # six numbers, two values in each of the seven text columns of ROWS, and two countries
    assert task.in_shape == (6 + 2 * 8,)
    assert task.train.std[1:3] == [1.0, 1.0] and task.train.mean[1:3] == [0.0, 0.0]
    indicators = task.train.inputs[:, 1:3]
    assert set(indicators.unique().tolist()) == {0.0, 1.0} and torch.equal(indicators.sum(1), torch.ones(36))
    assert task.test.inputs[0, 1:3].tolist() == [0.0, 0.0]  # a value that training never saw
    assert task.test.labels.tolist() == [int(i % 4 == 1) for i in range(40)]
    constant = [i for i, v in enumerate(task.train.inputs.T) if len(v.unique()) == 1]
    assert constant and torch.isfinite(task.train.fetch(torch.arange(36), None).inputs).all()


def table(path: Path, n: int = 60, **columns) -> Path:
    generator = np.random.default_rng(0)
    y = np.arange(n) % 3
    frame = pandas.DataFrame(
        {"size": generator.normal(size=n) + 4 * y, "colour": [["red", "blue", "?"][i % 3] for i in range(n)]}
        | {"label": [f"kind {i}" for i in y]}
        | columns
    )
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".parquet"])
def test_own_files(tmp_path, kind):
    path = str(table(tmp_path / f"mine{kind}"))
    task = load(task="table", data=path)
    assert task.name == "mine" and task.class_names == ["kind 0", "kind 1", "kind 2"] and task.in_shape == (4,)
    other = load(task="table", data=path, label_column="colour")
    assert other.num_classes == 3 and other.class_names == ["?", "blue", "red"]
    if kind != ".parquet":
        assert load(data=path).fingerprint == task.fingerprint  # the ending says that it is a table


def test_classes_that_are_numbers_keep_their_order(tmp_path):
    task = load(data=str(table(tmp_path / "n.csv", label=[str(10 * (i % 3) + 2) for i in range(60)])))
    assert task.class_names == ["2", "12", "22"]


def nan_at(column: str):
    return {column: [float("nan") if i == 7 else float(i) for i in range(60)]}


@pytest.mark.parametrize(
    ("config", "columns", "line"),
    [
        ({"task": "adult"}, {}, "needs its data: give the folder that holds adult/"),
        ({"task": "adult", "data_root": "{tmp}"}, {}, "no file adult/adult.data in"),
        ({"task": "table"}, {}, "give a CSV, TSV or parquet file with --data"),
        ({"data": "{tmp}/absent.csv"}, {}, "no file '.*absent.csv'"),
        ({"data": "{tmp}/mine.csv"}, {"label": None}, "name what to predict with --label-column"),
        ({"data": "{tmp}/mine.csv"}, {"label": ["a"] * 60}, "has one class only"),
        ({"data": "{tmp}/mine.csv"}, {"label": list(range(60))}, "60 classes in 60 rows.*number rather than a class"),
        ({"data": "{tmp}/mine.csv"}, {"label": ["", *"ab" * 29, "a"]}, "no label in row 1"),
        ({"data": "{tmp}/mine.csv"}, nan_at("size"), "column 'size' of 'mine' has no finite number in row 8"),
        ({"data": "{tmp}/mine.csv"}, {"size": [*["1"] * 59, "inf"]}, "no finite number in row 60"),
        ({"data": "{tmp}/mine.csv", "train_size": 2}, {}, "2 training rows do not show all 3 classes"),
        ({"data": "{tmp}/mine.csv", "train_size": 99}, {}, "train_size 99 is more than the 36"),
        ({"data": "{tmp}/none.csv"}, {}, "cannot read '.*none.csv' as a table"),
        ({"data": "{tmp}/short.csv"}, {}, "has no rows"),
        ({"data": "{tmp}/alone.csv"}, {}, "nothing to predict it from"),
    ],
)
def test_bad_tables_are_one_line(tmp_path, config, columns, line):
    path = table(tmp_path / "mine.csv", **{k: v for k, v in columns.items() if v is not None})
    if columns.get("label", "") is None:
        table(path, kind=["x"] * 60)
        pandas.read_csv(path).drop(columns="label").to_csv(path, index=False)
    (tmp_path / "none.csv").write_text("")
    (tmp_path / "short.csv").write_text("a,label\n")
    (tmp_path / "alone.csv").write_text("label\n" + "a\nb\n" * 9)
    values = {k: v.format(tmp=tmp_path) if isinstance(v, str) else v for k, v in config.items()}
    with pytest.raises(InputError, match=line) as error:
        load(**values)
    assert "\n" not in str(error.value)


def test_an_identifier_is_refused_and_a_missing_column_proposes_near_ones(tmp_path):
    names = table(tmp_path / "names.csv", n=1200, name=[f"person {i}" for i in range(1200)])
    with pytest.raises(InputError, match=r"text column 'name' of 'names' has 720 different values \(at most 500\)"):
        load(data=str(names))
    with pytest.raises(UnknownNameError, match="unknown column 'colours'; did you mean colour"):
        load(data=str(names), label_column="colours")


def test_a_run_on_a_table():
    run = limbeck.fit(
        "kd",
        task="wine",
        steps=60,
        lr=0.02,
        evaluations=1,
        teacher_epochs=5,
        student="mlp-8",
        engine={"progress": False},
    )
    assert run.measures("student")["accuracy"] > 0.8 and run.result["agreement"]["top1_agreement"] > 0.8


def test_a_file_goes_in_by_path_and_its_run_can_be_resumed(tmp_path):
    path = table(tmp_path / "mine.csv")
    settings = {"steps": 12, "evaluations": 0, "student": "mlp-8", "label_column": "label"}
    run = limbeck.fit("supervised", path, out=tmp_path / "run", engine={"progress": False}, **settings)
    assert run.result["confusion"]["labels"] == ["kind 0", "kind 1", "kind 2"]
    again = resume(tmp_path / "run", {"progress": False})
    for a, b in zip(run.method.student.parameters(), again.method.student.parameters(), strict=True):
        assert torch.equal(a, b)
