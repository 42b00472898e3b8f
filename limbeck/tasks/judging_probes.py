"""How encoders are judged side by side: probes of their frozen features, fitted on one data set and measured on another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.data import Data
from limbeck.core.errors import InputError
from limbeck.metrics.probing import LinearProbe, extract_features, probe


class Part(Data):
    """Some samples of a data set, without augmentation.

    Args:
        data: where they come from.
        index: (M,) their ids there.
    """

    def __init__(self, data: Data, index: Tensor) -> None:
        self.data, self.ids = data, index

    def __len__(self) -> int:
        return len(self.ids)

    def fetch(self, index: Tensor, view: int | None) -> Batch:
        return self.data.fetch(self.ids[index], None)


def at_most(data: Data, most: int) -> Data:
    """The data set, or so many of its samples, evenly spread over it."""
    if len(data) <= most:
        return data
    return Part(data, torch.linspace(0, len(data) - 1, most).round().long())


def halves(data: Data) -> tuple[Data, Data]:
    """Two disjoint random halves, the same ones every time.

    Raises:
        InputError: fewer than four samples.
    """
    if len(data) < 4:
        raise InputError("probes need labelled samples to be fitted on: give labelled training or validation data")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return Part(data, order[: len(data) // 2]), Part(data, order[len(data) // 2 :])


def has_labels(data: Data) -> bool:
    """True if the samples of a data set have labels."""
    return data.fetch(torch.arange(1), None).labels is not None


def probe_encoder(
    model: nn.Module,
    train: Data,
    test: Data,
    *,
    solver: Literal["logistic", "adamw"] = "logistic",
    c: float = 0.1,
    k: int = 20,
) -> dict[str, float]:
    """Probes of one encoder.

    Args:
        model: see :class:`limbeck.blocks.encoders.Encoder`.
        train, test: labelled; the probes are fitted on the first and measured on the second.
        solver, c: see :class:`limbeck.metrics.probing.LinearProbe`.
        k: neighbours; fewer where there are fewer training samples.

    Returns:
        ``linear_probe`` and ``knn_probe``, accuracies, and ``features``, the width.

    Raises:
        InputError: data without labels.
    """
    fitted, tested = (_labelled(model, part) for part in (train, test))
    scores = probe(fitted, tested, linear=LinearProbe(solver, c=c), k=min(k, len(train)))
    return {**scores, "features": float(fitted[0].shape[1])}


def probes_along(
    encoder: nn.Module, whole: nn.Module, states: Mapping[str, Tensor], train: Data, test: Data, **options: Any
) -> dict[str, list[float]]:
    """Probes at every point of a path in weight space.

    Args:
        encoder: gives the features; a part of ``whole``, or the same.
        whole: takes the weights; it is left with those of the last point.
        states: stacked weights (P, ...) of ``whole`` by name, see :func:`limbeck.blocks.interpolation.linear_path`.
        train, test, options: see :func:`probe_encoder`.

    Returns:
        P accuracies of each probe.
    """
    found: dict[str, list[float]] = {"linear_probe": [], "knn_probe": []}
    for p in range(len(next(iter(states.values())))):
        whole.load_state_dict({name: tensor[p] for name, tensor in states.items()})
        scores = probe_encoder(encoder, train, test, **options)
        for name, values in found.items():
            values.append(scores[name])
    return found


def _labelled(model: nn.Module, data: Data) -> tuple[Tensor, Tensor]:
    features, labels = extract_features(model, data)
    if labels is None:
        raise InputError("probes need labels, and the data has none: give (inputs, labels)")
    return features, labels
