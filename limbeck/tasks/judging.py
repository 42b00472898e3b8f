"""How the models of a task are judged side by side: quality, calibration, agreement with the teachers, size and speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.data import Data
from limbeck.metrics.classification import agreement, classification_metrics, confusion_matrix, reliability_table
from limbeck.metrics.cost import count_bytes, count_flops, count_parameters, measure_latency
from limbeck.tasks.teachers import predictions


def judge_classifiers(
    models: Mapping[str, nn.Module], test: Data, class_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Measure several models on the same test data.

    Args:
        models: by role; ``student`` is compared with ``teacher`` where both are there.
        test: with labels.
        class_names: for the confusion matrix.

    Returns:
        ``rows``: for each model quality, calibration, parameters, bytes, FLOPs per sample, latency per batch of 64 and its
        ratio to the first; ``agreement`` of the student with the teachers; ``confusion`` of the student.
    """
    modes = {role: m.training for role, m in models.items()}
    for model in models.values():
        model.eval()
    said = {role: predictions(model, test) for role, model in models.items()}
    labels = next(iter(said.values()))[1]
    classes = next(iter(said.values()))[0].shape[1]
    price = costs(models, test)
    rows = [{"who": role, **classification_metrics(said[role][0], labels, classes), **price[role]} for role in models]
    for role, model in models.items():
        model.train(modes[role])
    first = next(iter(models))
    teachers = [said[r][0] for r in models if r.startswith("teacher")]
    result: dict[str, Any] = {"rows": rows}
    if teachers:
        result["agreement"] = agreement(said[first][0], torch.stack(teachers).mean(0))
    pictures = sample_pictures(said[first][0], labels, test, class_names)
    if pictures:
        result["pictures"] = pictures
    result["reliability"] = reliability_table(torch.softmax(said[first][0], -1), labels)
    matrix = confusion_matrix(said[first][0], labels, classes)
    result["confusion"] = {"labels": list(class_names or map(str, range(classes))), "matrix": matrix.tolist()}
    return result


def costs(models: Mapping[str, nn.Module], data: Data, batch_size: int = 64) -> dict[str, dict[str, float]]:
    """What each model costs on samples of a data set: ``parameters``, ``bytes``, ``flops`` per sample, ``latency`` of a batch in
    seconds and ``latency_ratio``, its ratio to the first model's.

    Args:
        models: by role, all on one device; the first is the reference.
        data: where the batch comes from.
        batch_size: samples in it.
    """
    device = next(next(iter(models.values())).parameters()).device
    inputs = data.fetch(torch.arange(min(batch_size, len(data))), None).to(device).inputs
    speed = measure_latency(dict(models), inputs)
    return {
        role: {
            "parameters": count_parameters(model),
            "bytes": count_bytes(model),
            "flops": count_flops(model, inputs),
            "latency": speed[role]["median_seconds"],
            "latency_ratio": speed[role]["ratio"],
        }
        for role, model in models.items()
    }


def sample_pictures(
    logits: Tensor, labels: Tensor, test: Data, class_names: Sequence[str] | None = None, most: int = 20
) -> list[dict[str, str]]:
    """Test images that the student is most sure of and right about, and those it is most sure of and wrong about.

    Returns:
        entries with ``title``, ``caption`` and ``png`` (base64); none where the data is no set of stored images.
    """
    images = getattr(test, "inputs", None)
    if (
        not isinstance(images, Tensor)
        or images.dtype != torch.uint8
        or images.ndim != 4
        or images.shape[1] not in (1, 3)
    ):
        return []
    from limbeck.report.sheets import picture_sheet

    sure, said = torch.softmax(logits, -1).max(-1)
    right = said == labels
    names = list(class_names or map(str, range(logits.shape[1])))
    sheets = []
    for title, chosen in (("Surest mistakes", ~right), ("Surest right answers", right)):
        ids = chosen.nonzero().flatten()
        ids = ids[sure[ids].argsort(descending=True)][:most]
        if not len(ids):
            continue
        lines = [
            names[int(labels[i])] if bool(right[i]) else f"{names[int(labels[i])]}, not {names[int(said[i])]}"
            for i in ids
        ]
        caption = f"{int(chosen.sum())} of {len(labels)} test images; shown are the {len(ids)} of highest confidence."
        sheets.append({"title": title, "caption": caption, "png": picture_sheet(images[ids].numpy(), lines)})
    return sheets
