"""Views of a small data set, and where their labels come from.

Whoever trains on the images asks a labeler for ``fetch(epoch, index)`` and gets the views and the labels of exactly these views.
:class:`OnlineLabeler` runs the teacher on them, :class:`StaticLabeler` mixes one fixed label for each image, and
:class:`limbeck.blocks.soft_label_store.SoftLabelStore` reads what a teacher said earlier. All show the same views for the same
policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from limbeck.blocks.mixing import CutMix
from limbeck.blocks.views import RandomView
from limbeck.core.batch import call_model, logits_of
from limbeck.core.data import mix_seed
from limbeck.core.errors import InputError
from limbeck.core.seeding import preserved_random_state

Mix = Literal["none", "cutmix", "mixup"]
_ALPHA = {"none": 0.0, "cutmix": 1.0, "mixup": 0.8}


@dataclass(frozen=True)
class ViewPlan:
    """How all ``n`` images look in one epoch.

    Attributes:
        views: (n, 7) parameters of :class:`~limbeck.blocks.views.RandomView`.
        partner: (n,) int64, the image that each is mixed with, which shows its own view of the same epoch.
        share: (n,) of the image itself, in [0, 1].
        box: (n, 4) top, bottom, left, right of the box that comes from the partner, as fractions; all 0 where none does.
    """

    views: Tensor
    partner: Tensor
    share: Tensor
    box: Tensor


@dataclass(frozen=True)
class ViewPolicy:
    """Which views are shown in which epoch; a function of the seed and the epoch alone.

    Partners are drawn among all images of the epoch, not within a batch, so that a view does not depend on how the epoch is cut
    into batches (our decision; a batch is a random part of the epoch, so the distribution is the same). Shares and boxes are
    drawn for every image; the published code draws one for a batch.

    Attributes:
        view: crop and flip.
        mix: ``cutmix`` pastes a box of the partner, ``mixup`` averages the two.
        alpha: of the Beta distribution of the share; None: 1 for CutMix, 0.8 for mixup.
        seed: fixes all draws.
    """

    view: RandomView
    mix: Mix = "cutmix"
    alpha: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mix not in _ALPHA:
            raise InputError(f"unknown mixing '{self.mix}'; choose none, cutmix or mixup")
        if self.alpha is not None and not self.alpha > 0:
            raise InputError(f"alpha of the mixing must be above 0 (got {self.alpha})")

    def plan(self, epoch: int, n: int) -> ViewPlan:
        """The views of all ``n`` images in an epoch. The global random state is left alone."""
        views = self.view.draw(n, torch.Generator().manual_seed(mix_seed(self.seed, epoch, 17)))
        alpha = _ALPHA[self.mix] if self.alpha is None else self.alpha
        partner, share, box = torch.arange(n), torch.ones(n), torch.zeros(n, 4)
        if self.mix == "none":
            return ViewPlan(views, partner, share, box)
        with preserved_random_state():
            torch.manual_seed(mix_seed(self.seed, epoch, 19))
            if self.mix == "cutmix":
                drawn = CutMix.draw(n, alpha)
                partner, box = drawn.partner, drawn.box
                share = 1 - (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
            else:
                share = torch.distributions.Beta(alpha, alpha).sample((n,))
                partner = torch.randperm(n)
        return ViewPlan(views, partner, share, box)

    def show(self, images: Tensor, plan: ViewPlan, index: Tensor) -> Tensor:
        """(B, C, height, width): the views of the images ``index`` (B,) under a plan, on the images' device."""
        own = self._single(images, plan, index)
        if self.mix == "none":
            return own
        partner = plan.partner[index]
        other = self._single(images, plan, partner)
        if self.mix == "mixup":
            share = plan.share[index].to(own)[:, None, None, None]
            return share * own + (1 - share) * other
        mask = CutMix(partner, plan.box[index]).mask(*own.shape[2:])
        return torch.where(mask.to(own.device)[:, None], other, own)

    def _single(self, images: Tensor, plan: ViewPlan, index: Tensor) -> Tensor:
        return self.view.apply(images[index.to(images.device)], plan.views[index])

    def describe(self) -> dict[str, Any]:
        """Plain values that name the policy."""
        v = self.view
        return {
            "scale": list(v.scale),
            "ratio": list(v.ratio),
            "flip": v.flip,
            "jitter": v.jitter,
            "size": None if v.size is None else list(v.size),
            "antialias": v.antialias,
            "mix": self.mix,
            "alpha": _ALPHA[self.mix] if self.alpha is None else self.alpha,
            "seed": self.seed,
        }

    @classmethod
    def from_description(cls, about: dict[str, Any]) -> ViewPolicy:
        """The policy that :meth:`describe` described."""
        view = RandomView(
            tuple(about["scale"]),
            ratio=tuple(about["ratio"]),
            flip=about["flip"],
            jitter=about["jitter"],
            size=None if about["size"] is None else tuple(about["size"]),
            antialias=about["antialias"],
        )
        return cls(view, about["mix"], about["alpha"] or None, about["seed"])


class Labeler(Protocol):
    """Where views and their labels come from."""

    images: Tensor

    def fetch(self, epoch: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """Views (B, channels, height, width) and the teacher's float32 logits (B, classes) on them."""

    @property
    def nbytes(self) -> int:
        """Bytes that the labels take in storage."""


class OnlineLabeler:
    """Labels by running the teacher on each view, without gradients; nothing is stored.

    Args:
        teacher: a module in evaluation mode, or a callable, from images to logits.
        images: (n, C, H, W) as the teacher takes them.
        policy: which views.

    Attributes:
        forwards: views that went through the teacher so far.

    Raises:
        InputError: a teacher in training mode, or no images.
    """

    nbytes = 0

    def __init__(self, teacher: nn.Module | Callable[..., Any], images: Tensor, policy: ViewPolicy) -> None:
        check_images(images)
        if isinstance(teacher, nn.Module) and teacher.training:
            raise InputError("the teacher is in training mode, where it changes with every view: call eval() first")
        self.teacher, self.images, self.policy = teacher, images, policy
        self.forwards = 0
        self._plan: tuple[int, ViewPlan] | None = None

    def plan(self, epoch: int) -> ViewPlan:
        if self._plan is None or self._plan[0] != epoch:
            self._plan = (epoch, self.policy.plan(epoch, len(self.images)))
        return self._plan[1]

    @torch.no_grad()
    def fetch(self, epoch: int, index: Tensor) -> tuple[Tensor, Tensor]:
        views = self.policy.show(self.images, self.plan(epoch), index)
        self.forwards += len(views)
        return views, logits_of(call_model(self.teacher, views)).float()


class StaticLabeler:
    """One fixed label for each image; a mixed view gets the mixture of the two labels by the same share.

    Args:
        images: (n, C, H, W).
        values: (n, K) teacher logits, which are mixed as such (the mean of logits, then softened), or probabilities.
        policy: which views.

    Raises:
        InputError: no images, or another number of labels.

    Source: mixing of logits as in "Breaking Class Barriers: Efficient Dataset Distillation via Inter-Class Feature Compensator"
    (2025).
    """

    def __init__(self, images: Tensor, values: Tensor, policy: ViewPolicy) -> None:
        check_images(images)
        if values.ndim != 2 or len(values) != len(images):
            raise InputError(
                f"{len(images)} images need labels of shape ({len(images)}, classes), not {tuple(values.shape)}"
            )
        self.images, self.values, self.policy = images, values, policy
        self._plan: tuple[int, ViewPlan] | None = None

    @property
    def nbytes(self) -> int:
        """Two bytes for each value."""
        return 2 * self.values.numel()

    def plan(self, epoch: int) -> ViewPlan:
        if self._plan is None or self._plan[0] != epoch:
            self._plan = (epoch, self.policy.plan(epoch, len(self.images)))
        return self._plan[1]

    def fetch(self, epoch: int, index: Tensor) -> tuple[Tensor, Tensor]:
        plan = self.plan(epoch)
        share = plan.share[index, None].to(self.values)
        at = self.values.device
        mixed = share * self.values[index.to(at)] + (1 - share) * self.values[plan.partner[index].to(at)]
        return self.policy.show(self.images, plan, index), mixed


def check_images(images: Tensor) -> None:
    """That these are images, and at least one.

    Raises:
        InputError: they are not.
    """
    if images.ndim != 4 or len(images) == 0:
        raise InputError(f"images must have the shape (n, channels, height, width), n > 0; not {tuple(images.shape)}")
