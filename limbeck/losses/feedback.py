r"""Losses from judges of generated samples: rewards that stop pushing at a threshold, and tasks solved on the samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.losses.features import full_precision


@dataclass(frozen=True)
class Reward:
    """A differentiable judge of samples.

    Attributes:
        function: (samples (B, ...), condition) -> (B,) rewards, larger is better. Its own parameters should be frozen.
        threshold: no push beyond it; None: push without end, which invites reward hacking.
        weight: of its loss, 0 or more.
        name: in logs.
    """

    function: Callable[..., Tensor]
    threshold: float | None = None
    weight: float = 1.0
    name: str = "reward"

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise InputError(f"the weight of reward '{self.name}' must be 0 or more (got {self.weight})")

    def __call__(self, samples: Tensor, cond: Any = None) -> Tensor:
        """(B,) rewards.

        Raises:
            InputError: the function gives another shape.
        """
        found = self.function(samples, cond)
        if not isinstance(found, Tensor) or found.shape != (len(samples),):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(
                f"reward '{self.name}' must give one number for each of {len(samples)} samples, not {shape}"
            )
        return found


def thresholded_reward(rewards: Tensor, threshold: float | None = None) -> Tensor:
    r""":math:`\mathrm{mean}\,\mathrm{ReLU}(a - r)`; no gradient from samples whose reward has reached the threshold a.

    Args:
        rewards: (B,).
        threshold: a; None: no threshold, the loss is :math:`-\mathrm{mean}\, r`.

    Source: "Hyper-SD: Trajectory Segmented Consistency Model for Efficient Image Synthesis" (2024).

    Raises:
        InputError: not a vector.
    """
    if rewards.ndim != 1 or not len(rewards):
        raise InputError(f"rewards are one number for each sample, (B,), not {tuple(rewards.shape)}")
    values = full_precision(rewards)
    return -values.mean() if threshold is None else F.relu(threshold - values).mean()


def reward_loss(samples: Tensor, cond: Any, rewards: Sequence[Reward]) -> tuple[Tensor, dict[str, Tensor]]:
    r""":math:`L_{aes} = \sum_d w_d\, \mathrm{mean}\,\mathrm{ReLU}(a_d - r_d(x, c))`, and each mean reward by name, without gradient.

    Args:
        samples: (B, ...) generated, with gradient.
        cond: what they were asked to be.
        rewards: at least one; names that differ.

    Raises:
        InputError: no rewards, or two of one name.
    """
    names = [reward.name for reward in rewards]
    if not names or len(set(names)) != len(names):
        raise InputError(f"rewards need names that differ, and there must be one at least (got {names})")
    total = samples.new_zeros((), dtype=torch.float32)
    means: dict[str, Tensor] = {}
    for reward in rewards:
        values = reward(samples, cond)
        means[reward.name] = values.detach().float().mean()
        total = total + reward.weight * thresholded_reward(values, reward.threshold)
    return total, means


def perceptual_loss(
    samples: Tensor,
    labels: Any,
    task_model: Callable[[Tensor], Any],
    criterion: Callable[[Any, Any], Tensor] = F.cross_entropy,
) -> Tensor:
    r""":math:`L_{percep} = L(m(x'), y)`: a frozen model solves its task on generated samples, whose true answers are known.

    Samples come from noised real ones, so the labels y of those hold for them. The paper has an instance segmenter and masks.

    Args:
        samples: (B, ...) generated, with gradient.
        labels: what ``criterion`` compares with.
        task_model: m; differentiable in its input, its parameters frozen by the caller.
        criterion: (output, labels) -> scalar.

    Source: "Hyper-SD: Trajectory Segmented Consistency Model for Efficient Image Synthesis" (2024).

    Raises:
        InputError: the criterion gives no scalar.
    """
    loss = criterion(task_model(samples), labels)
    if loss.ndim != 0:
        raise InputError(f"the criterion of a task model must give a scalar, not {tuple(loss.shape)}")
    return loss
