"""How well an untrained candidate fits a teacher, from one labelled batch and no training: scores of pairs, higher is better."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.blocks.gaussian_init import gaussian_, gaussian_copy
from limbeck.blocks.heads import FOUND, HeadPaths, answer
from limbeck.core.batch import Batch
from limbeck.core.data import Data, mix_seed
from limbeck.core.errors import InputError, UnknownNameError
from limbeck.losses import channels, features, logits, relations

Init = Literal["gaussian", "own"]


@dataclass(frozen=True)
class Response:
    """What a network says about one labelled batch; no tensor carries a graph.

    Attributes:
        logits: (B, N).
        features: (B, ...), the last map before pooling.
        gradient: (N, C), of the mean cross-entropy with regard to the last linear layer's weight.
    """

    logits: Tensor
    features: Tensor
    gradient: Tensor

    @property
    def dead(self) -> bool:
        """Whether it says nothing: numbers that are not finite, or features that are the same for all samples."""
        flat = self.features.flatten(1)
        finite = all(bool(torch.isfinite(t).all()) for t in (self.logits, flat, self.gradient))
        return not finite or bool((flat == flat[:1]).all())


def respond(
    network: nn.Module,
    inputs: Any,
    labels: Tensor,
    *,
    init: Init = "gaussian",
    seed: int = 0,
    paths: HeadPaths = FOUND,
) -> Response:
    """The response of a copy of a network in training mode (so batch norm uses the batch); the network stays as it is.

    Only the last layer is differentiated, so that it costs a forward pass.

    Args:
        network: a classifier that ends in a linear layer.
        inputs: B samples as the network takes them.
        labels: (B,) class indices.
        init: ``gaussian``: weights drawn anew by :func:`~limbeck.blocks.gaussian_init.gaussian_`; ``own``: as they are.
        seed: of the draw.
        paths: where the last map and the classifier are, if not to be found.

    Raises:
        InputError, UnknownNameError: see :func:`~limbeck.blocks.heads.answer`.
    """
    drawn = gaussian_copy(network, seed) if init == "gaussian" else copy.deepcopy(network)
    return respond_in_place(drawn, inputs, labels, paths)


def respond_in_place(network: nn.Module, inputs: Any, labels: Tensor, paths: HeadPaths = FOUND) -> Response:
    """As :func:`respond`, of the network itself with its weights; its mode, gradient flags and running statistics change."""
    network.train().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.weight.requires_grad_(True)
    with torch.enable_grad():
        said = answer(network, inputs, paths)
        loss = F.cross_entropy(said.logits, labels)
        (gradient,) = torch.autograd.grad(loss, said.classifier.weight)
    return Response(said.logits.detach(), said.features.detach(), gradient)


PairScore = Callable[[Response, Response], Tensor]


def relation(candidate: Response, teacher: Response) -> Tensor:
    """- || G_t - G_s ||_F² / B² of the samples' Gram matrices with rows of length 1."""
    return -relations.similarity_preserving(candidate.features, teacher.features)


def semantic(candidate: Response, teacher: Response, compare: channels.Semantics = "auto") -> Tensor:
    """Minus the distance of what speaks for each class, see :func:`~limbeck.losses.channels.semantic_similarity_loss`."""
    return -channels.semantic_similarity_loss(candidate.gradient, teacher.gradient, compare)


def on_features(loss: Callable[[Tensor, Tensor], Tensor]) -> PairScore:
    """Any loss (student, teacher) -> scalar between last maps as a score: its negative."""
    return lambda candidate, teacher: -loss(candidate.features, teacher.features)


def on_logits(loss: Callable[[Tensor, Tensor], Tensor]) -> PairScore:
    """Any loss (student, teacher) -> scalar between logits as a score: its negative."""
    return lambda candidate, teacher: -loss(candidate.logits, teacher.logits)


PAIR_SCORES: dict[str, PairScore] = {
    "relation": relation,
    "semantic": semantic,
    "kd": on_logits(lambda student, teacher: logits.forward_kl(student, teacher, 4.0)),
    "fitnet": on_features(features.hint),
    "at": on_features(features.attention_transfer),
    "ickd": on_features(channels.inter_channel_correlation),
    "sp": on_features(relations.similarity_preserving),
    "cc": on_features(relations.correlation_congruence),
    "rkd-distance": on_features(relations.rkd_distance),
    "rkd-angle": on_features(relations.rkd_angle),
    "pkt": on_features(relations.pkt),
}
"""Scores of a pair by name; add your own. ``fitnet`` needs maps of equal shape, ``at`` of equal sides, ``ickd`` of equal width."""


def pair_scores(
    candidate: Response, teacher: Response, *names: str, compare: channels.Semantics = "auto"
) -> dict[str, float]:
    """Scores by name; minus infinity for a candidate that is :attr:`Response.dead`, and for a score that is no number.

    Args:
        candidate, teacher: responses to the same batch.
        names: of :data:`PAIR_SCORES`.
        compare: of ``semantic``.

    Raises:
        UnknownNameError: no such score.
        InputError: the shapes of the pair do not suit it.
    """
    unknown = [name for name in names if name not in PAIR_SCORES]
    if unknown:
        raise UnknownNameError("score", unknown[0], PAIR_SCORES)
    if candidate.logits.shape != teacher.logits.shape:
        raise InputError(
            f"the candidate gives logits of shape {tuple(candidate.logits.shape)} and the teacher {tuple(teacher.logits.shape)}"
        )
    if candidate.dead:
        return dict.fromkeys(names, -math.inf)
    asked: dict[str, PairScore] = dict(PAIR_SCORES)
    if compare != "auto":
        asked["semantic"] = functools.partial(semantic, compare=compare)
    values = {name: float(asked[name](candidate, teacher)) for name in names}
    return {name: value if value == value else -math.inf for name, value in values.items()}


class PairScorer:
    """Scores candidates against one teacher on the same batches, whose responses of the teacher are computed once.

    Args:
        teacher: a classifier; it is copied.
        batches: of each repeat; every repeat draws new weights. Of soft labels the likeliest classes count.
        names: of :data:`PAIR_SCORES`.
        teacher_init, init: see :func:`respond`.
        seed: of all draws; a candidate's also depend on its ``key``, not on which were scored before.
        compare: how gradients are compared, see :func:`semantic`.
        teacher_paths, paths: see :class:`~limbeck.blocks.heads.HeadPaths`.

    Raises:
        InputError: the teacher's answers to a batch are not finite or the same for all samples.
    """

    def __init__(
        self,
        teacher: nn.Module,
        batches: Sequence[Batch],
        names: Sequence[str] = ("relation", "semantic"),
        *,
        teacher_init: Init = "gaussian",
        init: Init = "gaussian",
        seed: int = 0,
        compare: channels.Semantics = "auto",
        teacher_paths: HeadPaths = FOUND,
        paths: HeadPaths = FOUND,
    ) -> None:
        self.batches, self.names, self.init, self.seed = batches, names, init, seed
        self.compare, self.paths = compare, paths
        self.teacher = [
            respond(teacher, b.inputs, class_labels(b), init=teacher_init, seed=mix_seed(seed, n), paths=teacher_paths)
            for n, b in enumerate(batches)
        ]
        if any(response.dead for response in self.teacher):
            raise InputError(
                f"the teacher's answers are not finite or all alike with {teacher_init} weights: it needs norms in training mode, "
                "or its own weights (teacher_init own)"
            )
        self._widths: set[bool] = set()

    def __call__(self, network: nn.Module, *key: int, repeats: range | None = None) -> dict[str, float]:
        """Mean scores of a candidate over ``repeats`` (None: all); the network is used up: its weights and mode change.

        Args:
            network: a fresh candidate on the batches' device.
            key: numbers that tell it from others.
            repeats: numbers of the batches.
        """
        found = []
        for n in range(len(self.batches)) if repeats is None else repeats:
            batch = self.batches[n]
            if self.init == "gaussian":
                gaussian_(network, mix_seed(self.seed, n, *key))
            response = respond_in_place(network, batch.inputs, class_labels(batch), self.paths)
            self._note_width(response.gradient.shape == self.teacher[n].gradient.shape)
            found.append(pair_scores(response, self.teacher[n], *self.names, compare=self.compare))
        return {name: sum(scores[name] for scores in found) / len(found) for name in self.names}

    def _note_width(self, equal: bool) -> None:
        if self._widths == {not equal} and self.compare == "auto" and "semantic" in self.names:
            warnings.warn(
                "some candidates end as wide as the teacher and some do not, so that their semantic scores do not compare: set compare to classes",
                stacklevel=2,
            )
        self._widths.add(equal)


def draw_batches(data: Data, size: int, count: int, seed: int) -> list[Batch]:
    """Batches of ``size`` samples each (all there are, if fewer), without augmentation; drawn without replacement within a batch."""
    generator = torch.Generator().manual_seed(seed)
    return [data.fetch(torch.randperm(len(data), generator=generator)[:size], None) for _ in range(count)]


def class_labels(batch: Batch) -> Tensor:
    """(B,) class indices; of soft labels the likeliest classes.

    Raises:
        InputError: there are none.
    """
    if batch.labels is None:
        raise InputError("candidates are judged on labelled samples, and there are no labels: give (inputs, labels)")
    return batch.labels.argmax(1) if batch.labels.is_floating_point() else batch.labels
