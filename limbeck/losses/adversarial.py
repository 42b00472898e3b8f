"""Losses and gradient tricks for adversarial distillation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.losses.features import full_precision


def gradient_reversal(x: Tensor, scale: float = 1.0) -> Tensor:
    """The identity, whose gradient is multiplied by ``-scale``.

    Between a student and a discriminator it makes one minimisation a min-max game: the discriminator descends the loss, the
    student climbs it.

    Args:
        x: any floating-point tensor.
        scale: size of the reversed gradient; 0 cuts it.

    Source: "Unsupervised Domain Adaptation by Backpropagation".
    """
    reversed_: Tensor = _GradientReversal.apply(x, scale)
    return reversed_


def discriminator_bce(discriminator_logits_student: Tensor, discriminator_logits_teacher: Tensor) -> Tensor:
    """Binary cross-entropy of a two-unit discriminator; targets are [1, 0] for the student and [0, 1] for the teacher.

    The two units are independent sigmoids. Mean over all rows of both inputs and over the 2 units; log 2 for an undecided
    discriminator. The discriminator minimises it; put :func:`gradient_reversal` before the discriminator for a student that
    wants to be mistaken for the teacher.

    Args:
        discriminator_logits_student, discriminator_logits_teacher: (B, 2) logits.

    Source: "MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without Tricks".

    Raises:
        InputError: a shape other than (B, 2).
    """
    for name, logits in (("student", discriminator_logits_student), ("teacher", discriminator_logits_teacher)):
        if logits.ndim != 2 or logits.shape[1] != 2 or not len(logits):
            raise InputError(f"the discriminator's logits for the {name} must be (B, 2), not {tuple(logits.shape)}")
    student, teacher = full_precision(discriminator_logits_student), full_precision(discriminator_logits_teacher)
    # softplus(-z) = -log sigmoid(z), softplus(z) = -log(1 - sigmoid(z))
    signs = student.new_tensor([-1.0, 1.0])
    terms = torch.cat([F.softplus(student * signs), F.softplus(teacher * -signs)])
    return terms.mean()


def softplus_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """``softplus(-real) + softplus(fake)``, each averaged over all logits: the non-saturating game's loss of the discriminator.

    2 log 2 for an undecided one. Its gradient also reaches what made the samples, unless they were detached.

    Args:
        real, fake: logits of any shape; positive means "real".

    Source: "Generative Adversarial Nets" (2014).
    """
    return F.softplus(-full_precision(real)).mean() + F.softplus(full_precision(fake)).mean()


def softplus_generator(fake: Tensor) -> Tensor:
    """``softplus(-fake)``, averaged: what the generator minimises in the non-saturating game.

    Source: "Generative Adversarial Nets" (2014).
    """
    return F.softplus(-full_precision(fake)).mean()


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """``relu(1 - real) + relu(1 + fake)``, each averaged over all logits; 2 for an undecided discriminator.

    Source: "Geometric GAN" (2017).
    """
    return F.relu(1 - full_precision(real)).mean() + F.relu(1 + full_precision(fake)).mean()


def hinge_generator(fake: Tensor) -> Tensor:
    """``-fake``, averaged: the generator's loss beside :func:`hinge_discriminator`.

    Source: "Geometric GAN" (2017).
    """
    return -full_precision(fake).mean()


class _GradientReversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return -ctx.scale * upstream, None
