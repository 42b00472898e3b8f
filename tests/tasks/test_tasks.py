"""Tasks: splits that do not overlap, subsets, noise, files of every kind, reference teachers from the cache."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from limbeck.core.errors import InputError, UnknownNameError
from limbeck.tasks.base import TaskConfig, flip_labels, load_task, stratified_order, take
from limbeck.tasks.teachers import predictions, reference_teacher


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LIMBECK_DATA", raising=False)


def test_digits_are_split_without_overlap_and_balanced():
    task = load_task(TaskConfig())
    assert (len(task.train), len(task.val), len(task.test)) == (1000, 297, 500)
    rows = torch.cat([part.inputs.flatten(1) for part in (task.train, task.val, task.test)])
    assert len(torch.unique(rows, dim=0)) > 1790  # scikit-learn's own data has a few repeated images
    for part in (task.train, task.val, task.test):
        counts = torch.bincount(part.labels, minlength=10).double()
        assert counts.max() / counts.min() < 1.2
    assert load_task(TaskConfig()).fingerprint == task.fingerprint


def test_subsets_are_stratified_nested_and_bounded():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    order = stratified_order(labels, 0)
    assert sorted(order.tolist()) == list(range(100))
    assert torch.bincount(labels[order[:20]]).tolist() == [12, 6, 2]
    assert set(take(labels, 20, 0).tolist()) < set(take(labels, 50, 0).tolist())
    with pytest.raises(InputError, match="train_size 101 is more than the 100"):
        take(labels, 101, 0)


def test_label_noise_flips_exactly_that_fraction_to_wrong_classes():
    labels = torch.arange(1000) % 10
    noisy = flip_labels(labels, 0.3, 10, 0)
    assert int((noisy != labels).sum()) == 300 and noisy.min() >= 0 and noisy.max() <= 9
    task = load_task(TaskConfig(train_size=200, label_noise=0.2))
    clean = load_task(TaskConfig(train_size=200))
    assert int((task.train.labels != clean.train.labels).sum()) == 40
    assert torch.equal(task.test.labels, clean.test.labels)


def pictures(folder: Path, sizes: tuple[int, ...] = (12,)) -> Path:
    generator = np.random.default_rng(0)
    for label, name in enumerate(("cats", "dogs")):
        (folder / name).mkdir(parents=True)
        for i in range(20):
            size = sizes[i % len(sizes)]
            pixels = generator.integers(0, 128, (size, size, 3)) + 100 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_an_image_folder_is_a_task(tmp_path: Path):
    task = load_task(TaskConfig(data=str(pictures(tmp_path / "pets"))))
    assert task.name == "pets" and task.class_names == ["cats", "dogs"] and task.in_shape == (3, 12, 12)
    assert len(task.train) + len(task.val) + len(task.test) == 40
    again = load_task(TaskConfig(data=str(tmp_path / "pets")))  # from the cache of decoded images
    assert again.fingerprint == task.fingerprint and again.class_names == task.class_names


def parquet(folder: Path, labels: list | None = None, n: int = 30) -> Path:
    folder.mkdir(parents=True)
    images = [Image.fromarray(np.full((8, 8), 8 * i % 256, np.uint8)) for i in range(n)]
    columns = {"image": images, "label": labels or [i % 3 for i in range(n)]}
    for part in ("train", "test"):
        datasets.Dataset.from_dict(columns).to_parquet(folder / f"{part}.parquet")
    return folder


def test_parquet_folders_work_by_path_and_as_known_names(tmp_path: Path):
    parquet(tmp_path / "mine")
    task = load_task(TaskConfig(data=str(tmp_path / "mine")))
    assert task.num_classes == 3 and len(task.test) == 30 and task.in_shape == (1, 8, 8)
    parquet(tmp_path / "cifar10", n=6000)
    known = load_task(TaskConfig(task="cifar10", data_root=str(tmp_path), train_size=100))
    assert len(known.train) == 100 and len(known.val) == 5000


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"task": "mnist"}, "needs its data: give the folder that holds mnist/ with --data-root or LIMBECK_DATA"),
        ({"task": "mnist", "data_root": "."}, r"no folder mnist/ in \."),
        ({"data": "{tmp}/empty"}, "holds no files"),
        ({"data": "{tmp}/mixed"}, "images of mixed sizes .* --image-size"),
        ({"data": "{tmp}/words"}, "not integers: encode the classes"),
        ({"data": "{tmp}/one"}, "has one class only"),
        ({"data": "{tmp}/broken"}, "cannot open '.*broken' as a data set"),
    ],
)
def test_bad_data_is_one_line(tmp_path: Path, config: dict, line: str):
    (tmp_path / "empty").mkdir()
    pictures(tmp_path / "mixed", (12, 10))
    parquet(tmp_path / "words", [f"w{i % 3}" for i in range(30)])
    parquet(tmp_path / "one", [0] * 30)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"no parquet at all")
    values = {k: v.format(tmp=tmp_path) if isinstance(v, str) else v for k, v in config.items()}
    with pytest.raises(InputError, match=line) as error:
        load_task(TaskConfig(**values))
    assert "\n" not in str(error.value)


def test_mixed_sizes_are_resized_when_asked(tmp_path: Path):
    assert load_task(TaskConfig(data=str(pictures(tmp_path / "m", (12, 10))), image_size=8)).in_shape == (3, 8, 8)


def test_unknown_task_proposes_near_ones():
    with pytest.raises(UnknownNameError, match="did you mean digits"):
        load_task(TaskConfig(task="digit"))


def test_reference_teachers_are_trained_once_and_leave_the_random_state_alone():
    task = load_task(TaskConfig(train_size=200, augment=False))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = reference_teacher(task, "mlp-32", epochs=40, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    second = reference_teacher(task, "mlp-32", epochs=40, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    logits, labels = predictions(first, task.test)
    assert (logits.argmax(1) == labels).double().mean() > 0.75
    other = reference_teacher(task, "mlp-32", epochs=40, seed=1, progress=False)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))
