"""Many networks of one architecture, trained together as one tensor of parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from limbeck.blocks.flat import FlatNetwork
from limbeck.core.data import Augmentation, mix_seed
from limbeck.core.errors import InputError, UnknownNameError

Loss = Callable[[Tensor, Tensor], Tensor]
MAPPED_UP_TO = 400_000  # numbers in the activations of one network's batch, on a CPU
AT_ONCE = 1 << 28  # numbers in the activations of all networks that go through a device together


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, C) against class indices (B,) or probabilities (B, C)."""
    return F.cross_entropy(logits, labels)


def ensemble_gradients(
    network: FlatNetwork, theta: Tensor, x: Tensor, y: Tensor, loss: Loss = label_loss, at_once: int | None = None
) -> tuple[Tensor, Tensor]:
    """Each network's loss on its own batch, and its gradient.

    Args:
        theta: (K, P) parameters.
        x: (K, B, ...) inputs.
        y: (K, B) class indices or (K, B, C) probabilities.
        loss: (logits, labels) -> scalar.
        at_once: how many networks go through one mapped forward pass, see :func:`networks_at_once`; None: all.

    Returns:
        losses (K,) and gradients (K, P), without a graph.
    """

    def objective(flat: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        return loss(network(flat, inputs), labels)

    size = len(theta) if at_once is None else at_once
    losses, gradients = [], []
    with torch.enable_grad():
        for p, a, b in zip(*(t.split(size) for t in (theta, x, y)), strict=True):
            leaf = p.detach().requires_grad_()
            if len(leaf) == 1:
                found = objective(leaf[0], a[0], b[0])[None]
            else:
                found = vmap(objective, randomness="different")(leaf, a, b)
            # The networks share nothing, so the gradient of the sum is every network's own; on a CPU it is up to a fifth faster
            # than mapping the gradient itself.
            gradients.append(torch.autograd.grad(found.sum(), leaf)[0])
            losses.append(found.detach())
    return torch.cat(losses), torch.cat(gradients)


def networks_at_once(network: FlatNetwork, theta: Tensor, sample: Tensor, batch_size: int) -> int:
    """How many of K networks should go through one mapped forward pass: all of them, or as many as pay or fit.

    Mapping saves calls and no arithmetic. On a CPU its grouped convolutions are slow where batches are large, so that networks
    take turns there; elsewhere memory sets the limit.

    Args:
        network: what is run.
        theta: (K, P) parameters, on the device of the training.
        sample: (n, ...) a few inputs, on that device.
        batch_size: of the training.
    """
    sizes: list[int] = []

    def note(module: nn.Module, inputs: object, output: object) -> None:
        sizes.append(output.numel() if isinstance(output, Tensor) else 0)

    leaves = [m for m in network.skeleton.modules() if not any(True for _ in m.children())]
    hooks = [leaf.register_forward_hook(note) for leaf in leaves]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            network(theta[0].detach(), sample)
    finally:
        for hook in hooks:
            hook.remove()
    numbers = max(1, sum(sizes) * batch_size // len(sample))
    if theta.device.type == "cpu":
        return len(theta) if numbers <= MAPPED_UP_TO else 1
    return max(1, min(len(theta), AT_ONCE // numbers))


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
        (K, P) trained parameters; those of a network that diverged are not finite, of which there is a warning.

    Raises:
        InputError: no samples.
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
    at_once = networks_at_once(network, theta, inputs[:2], size)
    for step in range(recipe.steps):
        index = orders.next()  # (K, B)
        x = inputs[index.flatten().to(inputs.device)]
        if augment is not None:
            x = augment.apply(x, augment.draw(len(x), generator))
        y = labels[index.to(labels.device)]
        losses, leaf.grad = ensemble_gradients(network, leaf, x.unflatten(0, index.shape), y, loss, at_once)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * 0.1 ** sum(step >= m * recipe.steps for m in recipe.milestones)
        optimizer.step()
        if after_step is not None:
            after_step(step + 1, losses)
    lost = int((~torch.isfinite(leaf).all(1)).sum())
    if lost:  # what was distilled before must not be lost for that
        warnings.warn(
            f"{lost} of {count} networks diverged at learning rate {recipe.lr:g} and count as they are: lower it",
            stacklevel=2,
        )
    return leaf.detach()


@torch.no_grad()
def ensemble_logits(network: FlatNetwork, theta: Tensor, inputs: Tensor, batch_size: int = 1000) -> Tensor:
    """(K, N, C) logits of all networks on the same samples (N, ...), ``batch_size`` of them and of networks together at a time."""
    parts = [vmap(network, in_dims=(0, None))(theta, part) for part in inputs.split(max(1, batch_size // len(theta)))]
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
