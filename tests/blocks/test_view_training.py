"""Students on views: the update against plain PyTorch, temperature, orders."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.blocks.flat import FlatNetwork
from limbeck.blocks.view_labelers import OnlineLabeler, StaticLabeler, ViewPolicy
from limbeck.blocks.view_training import ViewRecipe, train_on_views
from limbeck.blocks.views import RandomView
from limbeck.core.errors import InputError

torch.set_num_threads(1)


def student(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))


def labeler(mix: str = "none", low: float = 1.0) -> OnlineLabeler:
    images = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return OnlineLabeler(student(9).eval(), images, ViewPolicy(RandomView((low, 1.0), flip=0), mix, seed=3))


def test_equals_adamw_with_decay_on_weights_only():
    recipe = ViewRecipe(epochs=4, batch_size=8, lr=0.05, weight_decay=0.3, temperature=4.0)
    model = student()
    flat = FlatNetwork(model)
    seen = labeler("cutmix", 0.3)
    found = flat.write(train_on_views(flat, flat.flatten(model)[None], seen, recipe)[0])
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": weights, "weight_decay": 0.3}, {"params": biases, "weight_decay": 0.0}])
    for step in range(4):  # one batch of all images: its order does not matter
        views, logits = seen.fetch(step, torch.arange(8))
        p, log_q = torch.softmax(logits / 4, 1), torch.log_softmax(model(views) / 4, 1)
        loss = (p * (p.log() - log_q)).sum(1).mean()
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 + math.cos(math.pi * step / 4)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for a, b in zip(found.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_students_learn_what_the_teacher_says_each_in_its_order():
    flat = FlatNetwork(student())
    theta = torch.stack([flat.flatten(student(s)) for s in (1, 1)])
    losses: list[torch.Tensor] = []
    recipe = ViewRecipe(epochs=60, batch_size=3, lr=0.02, temperature=2.0)
    trained = train_on_views(flat, theta, labeler(), recipe, after_step=lambda step, found: losses.append(found))
    assert len(losses) == recipe.steps(8) == 60 * 2
    assert losses[-1].mean() < 0.1 * losses[0].mean()
    assert not torch.equal(trained[0], trained[1])
    again = train_on_views(flat, theta, labeler(), recipe)
    assert torch.equal(trained, again)
    assert not torch.equal(train_on_views(flat, theta, labeler(), recipe, seed=1), trained)


def test_another_loss_takes_other_labels():
    seen = labeler()
    hard = StaticLabeler(seen.images, torch.eye(4)[torch.arange(8) % 4], seen.policy)
    flat = FlatNetwork(student())
    theta = flat.flatten(student())[None]
    trained = train_on_views(flat, theta, hard, ViewRecipe(epochs=80, batch_size=8, lr=0.02), loss=F.cross_entropy)
    assert (flat(trained[0], seen.images).argmax(1) == torch.arange(8) % 4).all()


def test_divergence_is_said():
    flat = FlatNetwork(student())
    recipe = ViewRecipe(epochs=2, batch_size=8, lr=1e30)
    with pytest.raises(InputError, match="diverged at learning rate"):
        train_on_views(flat, flat.flatten(student())[None] * 1e20, labeler(), recipe)
