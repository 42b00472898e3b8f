"""How segmenters are judged side by side: overlap with the labels, agreement with the teachers, size and speed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from limbeck.core.batch import call_model, logits_of
from limbeck.core.data import Data
from limbeck.losses.segmentation import IGNORED
from limbeck.metrics.segmentation import class_iou, pixel_confusion, segmentation_metrics
from limbeck.tasks.judging import costs

BATCH = 8
SHOWN = 8
"""Test images in the report."""


@torch.no_grad()
def judge_segmenters(
    models: Mapping[str, nn.Module], test: Data, class_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Measure several segmenters on the same test data, a batch at a time.

    Args:
        models: by role; the first is compared with those whose role starts with ``teacher``.
        test: images with label maps (N, H, W), -100 where a pixel does not count.
        class_names: for the tables.

    Returns:
        ``rows``: for each model mean IoU, pixel accuracy, parameters, bytes, FLOPs per image, latency of a batch of 8 and its
        ratio to the first; ``agreement`` of the first with the mean of the teachers' logits, pixel by pixel; ``class_iou`` and
        ``confusion`` of the first; ``pictures``: images, labels and answers of the first.
    """
    first = next(iter(models))
    teachers = [role for role in models if role.startswith("teacher") and role != first]
    found: dict[str, Tensor] = {}
    same = divergence = pixels = 0.0
    classes = 0
    with evaluation_mode(*models.values()):
        for batch in test.batches(BATCH):
            said = {role: _logits(model, batch.inputs) for role, model in models.items()}
            labels = _labels(batch.labels)
            classes = said[first].shape[1]
            for role, logits in said.items():
                matrix = pixel_confusion(logits.argmax(1), labels, classes)
                found[role] = found[role] + matrix if role in found else matrix
            if teachers:
                counted = labels != IGNORED
                own, other = said[first], torch.stack([said[role] for role in teachers]).mean(0)
                pixels += float(counted.sum())
                same += float(((own.argmax(1) == other.argmax(1)) & counted).sum())
                p, q = other.log_softmax(1), own.log_softmax(1)
                divergence += float(((p.exp() * (p - q)).sum(1) * counted).sum())
        price = costs(models, test, batch_size=BATCH)
        pictures = answer_pictures(models[first], test, class_names)
    for measured in price.values():
        measured["latency_8"] = measured.pop("latency")
    result: dict[str, Any] = {
        "rows": [{"who": role, **segmentation_metrics(found[role]), **price[role]} for role in models]
    }
    if teachers and pixels:
        result["agreement"] = {"top1_agreement": same / pixels, "kl": divergence / pixels}
    names = list(class_names or map(str, range(classes)))
    shares = class_iou(found[first]).tolist()
    result["class_iou"] = {name: share for name, share in zip(names, shares, strict=True) if share == share}
    result["confusion"] = {"labels": names, "matrix": found[first].tolist()}
    if pictures:
        result["pictures"] = pictures
    return result


@torch.no_grad()
def segmenter_metrics(model: nn.Module, data: Data) -> dict[str, float]:
    """Mean IoU and pixel accuracy of one model; its mode is left as it is.

    Args:
        model: from images to logits at the images' size; used in evaluation mode.
        data: images with label maps.
    """
    total: Tensor | None = None
    with evaluation_mode(model):
        for batch in data.batches(BATCH):
            logits = _logits(model, batch.inputs)
            matrix = pixel_confusion(logits.argmax(1), _labels(batch.labels), logits.shape[1])
            total = matrix if total is None else total + matrix
    assert total is not None, "data sets are not empty"
    return segmentation_metrics(total)


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """The models in evaluation mode; every module's own flag is put back afterwards."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@torch.no_grad()
def answer_pictures(
    model: nn.Module, test: Data, class_names: Sequence[str] | None = None, most: int = SHOWN
) -> list[dict[str, str]]:
    """The first test images, each beside its label map and the model's answer.

    Returns:
        one entry with ``title``, ``caption`` and ``png`` (base64); none where the data is no set of stored RGB or grey images.
    """
    images = getattr(test, "inputs", None)
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4:
        return []
    if images.shape[1] not in (1, 3):
        return []
    from limbeck.report.sheets import picture_sheet

    batch = test.fetch(torch.arange(min(most, len(test))), None)
    answer = _logits(model, batch.inputs).argmax(1)
    labels = _labels(batch.labels)
    shown = images[: len(answer)].expand(-1, 3, -1, -1)
    sheet = torch.stack([shown, _coloured(labels), _coloured(answer)], 1).flatten(0, 1)
    lines = ["image", "label", "answer"] * len(answer)
    names = ", ".join(f"{c} {_COLOUR_NAMES[n % len(_COLOUR_NAMES)]}" for n, c in enumerate(class_names or []))
    caption = f"The first {len(answer)} of {len(test)} test images. {names}".strip()
    return [
        {
            "title": "Images, labels and answers",
            "caption": caption,
            "png": picture_sheet(sheet.numpy(), lines, columns=6),
        }
    ]


_COLOUR_NAMES = ("black", "blue", "orange", "green", "red", "purple", "brown", "pink", "olive", "cyan")
_COLOURS = np.array(
    [
        (0, 0, 0),
        (31, 119, 180),
        (255, 127, 14),
        (44, 160, 44),
        (214, 39, 40),
        (148, 103, 189),
        (140, 86, 75),
        (227, 119, 194),
        (188, 189, 34),
        (23, 190, 207),
        (255, 255, 255),
    ],
    dtype=np.uint8,
)


def _coloured(maps: Tensor) -> Tensor:
    """Class maps (N, H, W) as (N, 3, H, W) uint8; the classes' colours repeat after ten, ignored pixels are white."""
    place = torch.where(maps == IGNORED, torch.full_like(maps, len(_COLOURS) - 1), maps % (len(_COLOURS) - 1))
    return torch.from_numpy(_COLOURS)[place].permute(0, 3, 1, 2)


def _logits(model: nn.Module, inputs: Any) -> Tensor:
    """(B, C, H, W) on the CPU."""
    first = next(model.parameters(), None)
    if first is not None and isinstance(inputs, Tensor):
        inputs = inputs.to(first.device)
    return logits_of(call_model(model, inputs)).float().cpu()


def _labels(labels: Tensor | None) -> Tensor:
    assert labels is not None, "test data has labels"
    return labels.cpu()
