"""Training students on views of a small data set with the labels of exactly these views."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.blocks.ensembles import Loss, ensemble_gradients, networks_at_once
from limbeck.blocks.flat import FlatNetwork
from limbeck.blocks.view_labelers import Labeler
from limbeck.core.data import mix_seed
from limbeck.core.errors import InputError
from limbeck.losses.logits import forward_kl


class ViewRecipe(NamedTuple):
    """How students are trained on views.

    Attributes:
        epochs: passes over the images; each shows new views.
        batch_size: views per update; all images where there are fewer. The rest of an epoch that fills no batch is left out.
        lr: peak rate of AdamW, cosine to 0.
        weight_decay: decoupled, on weights only, not on biases and scales.
        temperature: T of the divergence.
    """

    epochs: int = 300
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.01
    temperature: float = 20.0

    def steps(self, count: int) -> int:
        """Updates on a set of ``count`` images."""
        return self.epochs * (count // min(self.batch_size, count))


def train_on_views(
    network: FlatNetwork,
    theta: Tensor,
    labeler: Labeler,
    recipe: ViewRecipe,
    *,
    seed: int = 0,
    loss: Loss | None = None,
    after_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    r"""Train students together, each in an order of its own, on the same views.

    The loss is :math:`\mathrm{KL}(\mathrm{softmax}(t/T)\,\|\,\mathrm{softmax}(s/T))`, averaged over the batch, **without** the
    factor T² (so a high temperature also makes for small gradients, which AdamW does not see).

    Args:
        network: the students' architecture.
        theta: (K, P) initial parameters; not changed.
        labeler: where views and labels come from.
        recipe: see :class:`ViewRecipe`.
        seed: of the orders.
        loss: (logits (B, C), labels (B, C)) -> scalar, in place of the divergence.
        after_step: called with the number of updates done and the losses (K,).

    Returns:
        (K, P) trained parameters.

    Raises:
        InputError: a loss that is not finite.

    Source: relabelling and training as in "Squeeze, Recover and Relabel" (2023), after FKD (2022).
    """
    count, n = len(theta), len(labeler.images)
    size = min(recipe.batch_size, n)
    total = recipe.steps(n)
    criterion = loss or _divergence(recipe.temperature)
    leaf = theta.clone().requires_grad_()
    optimizer = torch.optim.AdamW([leaf], recipe.lr, weight_decay=0.0)
    # Parameters are one vector each, so the optimiser cannot tell weights from biases: decay is applied by hand.
    sizes = torch.tensor(network.sizes)
    decayed = torch.tensor(network.weights()).repeat_interleave(sizes).to(leaf) * recipe.weight_decay
    generator = torch.Generator().manual_seed(mix_seed(seed, 29))
    at_once = networks_at_once(network, theta, labeler.images[:2], size)
    step = 0
    for epoch in range(recipe.epochs):
        orders = torch.rand(count, n, generator=generator).argsort(1)
        for start in range(0, n - size + 1, size):
            index = orders[:, start : start + size]
            views, labels = labeler.fetch(epoch, index.flatten())
            losses, leaf.grad = ensemble_gradients(
                network, leaf, views.unflatten(0, index.shape), labels.unflatten(0, index.shape), criterion, at_once
            )
            rate = recipe.lr * (1 + math.cos(math.pi * step / total)) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.no_grad():
                leaf -= rate * decayed * leaf
            optimizer.step()
            step += 1
            if after_step is not None:
                after_step(step, losses)
    if not bool(torch.isfinite(leaf).all()):
        raise InputError(f"training on views diverged at learning rate {recipe.lr:g}: lower it")
    return leaf.detach()


def _divergence(temperature: float) -> Loss:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return forward_kl(logits, labels, temperature)

    return loss
