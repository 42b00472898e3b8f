"""Discriminators for adversarial distillation: they tell a student's outputs from a teacher's."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from limbeck.core.errors import InputError


class LogitDiscriminator(nn.Module):
    """Whose output is it? Two scores for each vector of class scores; :func:`limbeck.losses.adversarial.discriminator_bce`
    reads the first as "student" and the second as "teacher".

    Three linear layers of widths C -> max(C // 8, 8) -> max(C // 64, 4) -> 2 with ReLU in between. A 1x1 convolution on the
    vector seen as a C x 1 x 1 map, as in the published code, is the same function. The lower bounds are ours: C // 64 is 0
    for fewer than 64 classes.

    Args:
        num_classes: C, the length of the vectors.
        final_relu: ReLU after the last layer too, as in the published code. Scores are then never negative, so the loss
            cannot fall below log(2) / 2, and a score at 0 on every row gets no gradient any more.

    Source: "MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without Tricks" (2020).
    """

    def __init__(self, num_classes: int, final_relu: bool = False) -> None:
        super().__init__()
        if num_classes < 1:
            raise InputError(f"a discriminator needs at least one class (got {num_classes})")
        self.num_classes = num_classes
        widths = (num_classes, max(num_classes // 8, 8), max(num_classes // 64, 4), 2)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*(layers if final_relu else layers[:-1]))

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, C) logits or probabilities in, (B, 2) scores out.

        Raises:
            InputError: another shape.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.num_classes:
            raise InputError(
                f"the discriminator was made for vectors (B, {self.num_classes}), not {tuple(vectors.shape)}: "
                "give num_classes=… when it is made"
            )
        scores: Tensor = self.layers(vectors.to(next(self.parameters()).dtype))
        return scores

    @torch.no_grad()
    def accuracy(self, scores_student: Tensor, scores_teacher: Tensor) -> Tensor:
        """Share of rows that it takes for what they are: 1 for a perfect one, about 1/2 for one that is fooled.

        Args:
            scores_student, scores_teacher: (B, 2) scores of the student's and the teacher's vectors. A tie counts as "student".
        """
        right = torch.cat([scores_student[:, 0] >= scores_student[:, 1], scores_teacher[:, 1] > scores_teacher[:, 0]])
        return right.float().mean()
