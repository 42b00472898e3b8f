"""Tasks with a class for every pixel: drawn shapes, folders in TopoMortar's layout, label maps that move with their images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from limbeck.core.data import TensorData
from limbeck.core.errors import InputError
from limbeck.networks import build
from limbeck.tasks.augment import ShiftFlip
from limbeck.tasks.augment_maps import WindowFlip
from limbeck.tasks.base import TaskConfig, load_task
from limbeck.tasks.judging_segmentation import judge_segmenters, segmenter_metrics
from limbeck.tasks.segmenters import reference_segmenter
from limbeck.tasks.shapes import CLASSES, draw_shapes
from tests.helpers import lines


def test_shapes_come_from_the_seed() -> None:
    images, labels = draw_shapes(40, 32, seed=3)
    again = draw_shapes(40, 32, seed=3)
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    assert not torch.equal(images, draw_shapes(40, 32, seed=4)[0])
    assert images.shape == (40, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.shape == (40, 32, 32) and labels.unique().tolist() == list(range(len(CLASSES)))
    kinds = torch.stack([(labels == c).flatten(1).any(1) for c in range(1, len(CLASSES))]).sum(0)
    assert kinds.min() >= 1 and kinds.max() <= 5


def test_objects_have_the_outlines_of_their_classes() -> None:
    """Fill of the bounding box of lone objects: a square turned by a: (|cos| + |sin|)^-2; a disc pi/4; a ring less."""
    _, labels = draw_shapes(300, 48, seed=1)
    fill = {}
    for c, name in enumerate(CLASSES[1:], 1):
        own = labels == c
        rows, columns = own.any(2), own.any(1)
        box = rows.sum(1) * columns.sum(1)
        fill[name] = (own.sum((1, 2))[box > 0].double() / box[box > 0]).median().item()
    assert fill["disc"] > fill["square"] > fill["triangle"] and fill["disc"] > fill["ring"]


def test_a_window_moves_image_and_labels_alike() -> None:
    labels = draw_shapes(6, 48, seed=0)[1]
    images = labels[:, None].float()  # an image that shows its own labels
    augment = WindowFlip(24, 0.4, 0.6)
    parameters = augment.draw(6, torch.Generator().manual_seed(0))
    moved = augment.apply_labels(labels, parameters)
    shown = augment.apply(images, parameters)[:, 0]
    assert moved.shape == (6, 24, 24) and moved.dtype == torch.int64
    sharp = (shown - shown.round()).abs() < 1e-3  # between classes the image is interpolated
    assert sharp.double().mean() > 0.8
    assert (moved[sharp] == shown[sharp].round()).double().mean() > 0.99
    ignored = augment.apply_labels(torch.full((6, 48, 48), -100), parameters)
    assert bool((ignored == -100).all())


def test_a_whole_window_changes_nothing_and_a_mirror_mirrors() -> None:
    x = torch.rand(2, 3, 12, 12)
    same = torch.tensor([[1.0, 0, 0, 1], [1.0, 0, 0, -1]])
    out = WindowFlip(12).apply(x, same)
    torch.testing.assert_close(out[0], x[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(out[1], x[1].flip(-1), atol=1e-5, rtol=0)


def test_data_hands_the_same_parameters_to_both() -> None:
    images, labels = draw_shapes(5, 24, seed=0)
    data = TensorData(images, labels, augment=WindowFlip(24))
    batch = data.fetch(torch.arange(5), 3)
    parameters = data._parameters(3)
    assert torch.equal(batch.labels, data.augment.apply_labels(labels, parameters))
    plain = data.fetch(torch.arange(5), None)
    assert torch.equal(plain.labels, labels) and not torch.equal(batch.labels, labels)
    with pytest.raises(InputError, match="ShiftFlip moves images and leaves their label maps"):
        TensorData(images, labels, augment=ShiftFlip(1))


def test_the_shapes_task_keeps_few_labels() -> None:
    task = load_task(TaskConfig(task="shapes", labelled=24, image_size=16))
    assert (len(task.train), len(task.train.unlabelled), len(task.val), len(task.test)) == (24, 360, 100, 200)
    assert task.in_shape == (3, 16, 16) and task.num_classes == 6
    assert task.train.unlabelled.fetch(torch.arange(2), 0).labels is None
    fewer, whole = (load_task(TaskConfig(task="shapes", labelled=n, image_size=16)) for n in (6, None))
    some = {x.sum().item() for x in fewer.train.labelled.inputs}
    assert some <= {x.sum().item() for x in task.train.labelled.inputs}
    assert len(whole.train) == 384 and whole.train.labels.shape == (384, 16, 16)
    noisy = load_task(TaskConfig(task="shapes", image_size=16, label_noise=0.2))
    assert (noisy.train.labels != whole.train.labels).double().mean().item() == pytest.approx(0.2, abs=1e-4)
    with pytest.raises(InputError, match="labelled 385 is more than the 384"):
        load_task(TaskConfig(task="shapes", labelled=385, image_size=16))


def wall(folder: Path, parts: dict[str, int]) -> Path:
    """Walls whose mortar, white in the mask, is the bright part of the image."""
    generator = np.random.default_rng(0)
    for part, count in parts.items():
        for kind in ("images", "accurate"):
            (folder / "topomortar" / part / kind).mkdir(parents=True)
        for n in range(count):
            mortar = np.zeros((32, 32), bool)
            mortar[2 * generator.integers(0, 4) :: 8] = True
            mortar = np.kron(mortar[::2, ::2], np.ones((2, 2), bool))
            image = np.where(mortar[..., None], 220, (150, 60, 40)) + generator.integers(-20, 20, (32, 32, 3))
            file = f"{n:03}.png"
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "topomortar" / part / "images" / file)
            mask = folder / "topomortar" / part / "accurate" / file
            Image.fromarray((255 * mortar).astype(np.uint8)).save(mask)
    return folder


def test_topomortar_is_read_in_its_own_layout(tmp_path: Path) -> None:
    root = wall(tmp_path, {"train": 6, "val": 2, "test": 3})
    task = load_task(TaskConfig(task="topomortar", data_root=str(root), labelled=2, image_size=16))
    assert (len(task.train), len(task.train.unlabelled), len(task.val), len(task.test)) == (2, 4, 2, 3)
    assert task.class_names == ["brick", "mortar"] and task.in_shape == (3, 16, 16)
    assert task.test.labels.dtype == torch.int64 and set(task.test.labels.unique().tolist()) <= {0, 1}
    bright = task.test.inputs.float().mean(1)
    assert bright[task.test.labels == 1].mean() > bright[task.test.labels == 0].mean() + 50
    assert task.train.fetch(torch.arange(2), 0).labels.shape == (2, 8, 8)  # windows of half the side


def test_topomortar_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIMBECK_DATA", raising=False)
    with pytest.raises(InputError, match=r"needs its data.*--data-root or LIMBECK_DATA"):
        load_task(TaskConfig(task="topomortar"))
    root = wall(tmp_path, {"train": 2, "val": 1, "test": 1})
    (root / "topomortar" / "val" / "accurate" / "000.png").unlink()
    with pytest.raises(InputError, match=r"lacks the masks of 1 images, such as 000\.png"):
        load_task(TaskConfig(task="topomortar", data_root=str(root)))
    (root / "topomortar" / "val" / "accurate" / "000.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"cannot read the image .*000\.png"):
        load_task(TaskConfig(task="topomortar", data_root=str(root)))


class Answers(nn.Module):
    """Says what it is told, image by image."""

    def __init__(self, labels: torch.Tensor, classes: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(nn.functional.one_hot(labels, classes).permute(0, 3, 1, 2).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits[x[:, 0, 0, 0].round().long()] + 0 * x.mean()


def test_judging_compares_with_labels_and_teachers() -> None:
    labels = draw_shapes(10, 16, seed=0)[1]
    inputs = torch.arange(10.0)[:, None, None, None].expand(10, 3, 16, 16).contiguous()
    masked = labels.clone()
    masked[:, :4] = -100
    data = TensorData(inputs, masked)
    models = {"student": Answers(torch.zeros_like(labels), 6).train(), "teacher wide": Answers(labels, 6).eval()}
    found = judge_segmenters(models, data, list(CLASSES))
    student, teacher = found["rows"]
    background = (labels[:, 4:] == 0).double().mean().item()
    assert teacher["miou"] == 1 and student["pixel_accuracy"] == pytest.approx(background)
    assert student["miou"] == pytest.approx(background / int(labels[:, 4:].unique().numel()))
    assert found["agreement"]["top1_agreement"] == pytest.approx(background)
    assert found["agreement"]["kl"] > 0 and {"latency_8", "flops", "parameters"} <= set(student)
    assert np.sum(found["confusion"]["matrix"]) == 10 * 12 * 16 and "pictures" not in found
    assert models["student"].training and not models["teacher wide"].training
    assert segmenter_metrics(models["teacher wide"], data)["miou"] == 1


def test_pictures_show_image_label_and_answer() -> None:
    images, labels = draw_shapes(3, 16, seed=0)
    labels[0, 0] = -100
    net = build("segmenter-w4-l2-b1", in_shape=(3, 16, 16), num_classes=6)
    found = judge_segmenters({"student": net}, TensorData(images, labels), list(CLASSES))
    (sheet,) = found["pictures"]
    assert sheet["caption"].startswith("The first 3 of 3 test images. background black, disc blue") and sheet["png"]
    assert "agreement" not in found


def test_reference_segmenters_are_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path))
    task = load_task(TaskConfig(task="shapes", labelled=8, train_size=20, image_size=16))
    state = torch.get_rng_state()
    first = reference_segmenter(task, "segmenter-w4-l2-b1", steps=8, progress=False)
    assert torch.equal(torch.get_rng_state(), state) and not first.training
    second = reference_segmenter(task, "segmenter-w4-l2-b1", steps=8, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert {row["stage"] for row in lines(next(tmp_path.rglob("metrics.jsonl")).parent)} == {"labels", "cross"}
    other = reference_segmenter(task, "segmenter-w4-l2-b1", steps=8, seed=1, progress=False)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))
