"""Many networks of one architecture, trained together as one tensor of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from limbeck.blocks.flat import FlatNetwork
from limbeck.core.data import Augmentation, mix_seed
from limbeck.core.errors import InputError, UnknownNameError

Loss = Callable[[Tensor, Tensor], Tensor]


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, C) against class indices (B,) or probabilities (B, C)."""
    return F.cross_entropy(logits, labels)


def ensemble_gradients(
    network: FlatNetwork, theta: Tensor, x: Tensor, y: Tensor, loss: Loss = label_loss
) -> tuple[Tensor, Tensor]:
    """Each network's loss on its own batch, and its gradient.

    Args:
        theta: (K, P) parameters.
        x: (K, B, ...) inputs.
        y: (K, B) class indices or (K, B, C) probabilities.
        loss: (logits, labels) -> scalar.

    Returns:
        losses (K,) and gradients (K, P), without a graph.
    """
    with torch.enable_grad():
        leaf = theta.detach().requires_grad_()
        losses = vmap(lambda p, a, b: loss(network(p, a), b), randomness="different")(leaf, x, y)
        # The networks share nothing, so the gradient of the sum is every network's own.
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), gradient


class Recipe(NamedTuple):
    """How networks are trained on a set of samples.

    Attributes:
        steps: updates.
        batch_size: samples per update; the whole set where it is smaller.
        lr: learning rate, constant up to each milestone, where it is divided by 10.
        momentum, weight_decay: of SGD (decay added to the gradient).
        milestones: fractions of the training.
        optimizer: ``sgd``, or ``adamw`` (whose decay is ``weight_decay``, decoupled, and whose momentum is its own).
    """

    steps: int
    batch_size: int = 256
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    milestones: tuple[float, ...] = (0.5,)
    optimizer: str = "sgd"


def train_ensemble(
    network: FlatNetwork,
    theta: Tensor,
    inputs: Tensor,
    labels: Tensor,
    recipe: Recipe,
    *,
    seed: int = 0,
    augment: Augmentation | None = None,
    loss: Loss = label_loss,
    after_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Train networks together by SGD, each on batches of its own order.

    Args:
        theta: (K, P) initial parameters; not changed.
        inputs: (N, ...) samples, shared by all networks.
        labels: (N,) class indices or (N, C) probabilities.
        recipe: see :class:`Recipe`.
        seed: of the orders and the augmentation.
        augment: applied anew to every batch.
        after_step: called with the number of steps done and the losses (K,).

    Returns:
        (K, P) trained parameters.

    Raises:
        InputError: no samples, or a loss that is not finite.
    """
    if not len(inputs):
        raise InputError("there are no samples to train networks on")
    count, size = len(theta), min(recipe.batch_size, len(inputs))
    leaf = theta.clone().requires_grad_()
    optimizer: torch.optim.Optimizer
    # Updates are elementwise, so one optimiser over the stacked parameters is each network's own.
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD([leaf], recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    elif recipe.optimizer == "adamw":
        optimizer = torch.optim.AdamW([leaf], recipe.lr, weight_decay=recipe.weight_decay)
    else:
        raise UnknownNameError("optimizer", recipe.optimizer, ("sgd", "adamw"))
    generator = torch.Generator().manual_seed(mix_seed(seed, 17))
    orders = _Orders(len(inputs), size, count, generator)
    for step in range(recipe.steps):
        index = orders.next()  # (K, B)
        x = inputs[index.flatten().to(inputs.device)]
        if augment is not None:
            x = augment.apply(x, augment.draw(len(x), generator))
        y = labels[index.to(labels.device)]
        losses, leaf.grad = ensemble_gradients(network, leaf, x.unflatten(0, index.shape), y, loss)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * 0.1 ** sum(step >= m * recipe.steps for m in recipe.milestones)
        optimizer.step()
        if after_step is not None:
            after_step(step + 1, losses)
    if not bool(torch.isfinite(leaf).all()):
        raise InputError(f"training diverged at learning rate {recipe.lr:g}: lower it")
    return leaf.detach()


@torch.no_grad()
def ensemble_logits(network: FlatNetwork, theta: Tensor, inputs: Tensor, batch_size: int = 1000) -> Tensor:
    """(K, N, C) logits of all networks on the same samples (N, ...)."""
    parts = [vmap(network, in_dims=(0, None))(theta, part) for part in inputs.split(batch_size)]
    return torch.cat(parts, 1)


class _Orders:
    """Endless shuffled passes over ``n`` samples for each of ``count`` networks; batches are always full."""

    def __init__(self, n: int, size: int, count: int, generator: torch.Generator) -> None:
        self.n, self.size, self.count, self.generator = n, size, count, generator
        self.left = torch.empty(count, 0, dtype=torch.long)

    def next(self) -> Tensor:
        while self.left.shape[1] < self.size:
            fresh = torch.rand(self.count, self.n, generator=self.generator).argsort(1)
            self.left = torch.cat([self.left, fresh], 1)
        batch, self.left = self.left[:, : self.size], self.left[:, self.size :]
        return batch
