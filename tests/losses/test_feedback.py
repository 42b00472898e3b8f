from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.core.errors import InputError
from limbeck.losses.feedback import Reward, perceptual_loss, reward_loss, thresholded_reward


def test_thresholded_reward_by_hand():
    rewards = np.array([0.2, 1.5, -1.0, 0.9])
    expected = np.maximum(0.9 - rewards, 0).mean()
    assert thresholded_reward(torch.tensor(rewards), 0.9).item() == pytest.approx(expected)
    assert thresholded_reward(torch.tensor(rewards)).item() == pytest.approx(-rewards.mean())


def test_no_push_beyond_the_threshold():
    rewards = torch.tensor([0.0, 2.0, 1.0 + 1e-6], requires_grad=True)
    (slope,) = torch.autograd.grad(thresholded_reward(rewards, 1.0), rewards)
    torch.testing.assert_close(slope, torch.tensor([-1 / 3, 0.0, 0.0]))
    (slope,) = torch.autograd.grad(thresholded_reward(rewards), rewards)
    torch.testing.assert_close(slope, torch.full((3,), -1 / 3))


def test_rewards_are_weighted_and_logged_without_gradient():
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], requires_grad=True)
    cond = torch.tensor([0, 1])
    rewards = [
        Reward(lambda x, c: x.sum(1), 3.0, 2.0, "sum"),
        Reward(lambda x, c: x.gather(1, c[:, None])[:, 0], None, 0.5, "own"),
    ]
    loss, means = reward_loss(x, cond, rewards)
    assert loss.item() == pytest.approx(2 * (0 + 1) / 2 - 0.5 * (1 - 1) / 2)
    assert means["sum"].item() == 2.5 and means["own"].item() == 0 and not means["sum"].requires_grad
    (slope,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(slope, torch.tensor([[-0.25, 0.0], [-1.0, -1.25]]))


def test_perceptual_loss_is_the_criterion_on_the_samples():
    torch.manual_seed(0)
    model = nn.Linear(3, 4).requires_grad_(False)
    x, y = torch.randn(5, 3, requires_grad=True), torch.tensor([0, 1, 2, 3, 0])
    loss = perceptual_loss(x, y, model)
    torch.testing.assert_close(loss, F.cross_entropy(model(x), y))
    loss.backward()
    assert x.grad is not None and bool((x.grad != 0).any()) and model.weight.grad is None


def test_bad_input_is_named():
    with pytest.raises(InputError, match="reward 'r' must give one number for each of 2 samples"):
        Reward(lambda x, c: x, name="r")(torch.zeros(2, 3))
    with pytest.raises(InputError, match="weight of reward 'r'"):
        Reward(lambda x, c: x, weight=-1, name="r")
    with pytest.raises(InputError, match="one number for each sample"):
        thresholded_reward(torch.zeros(2, 2), 0.0)
    same = Reward(lambda x, c: x.sum(1))
    with pytest.raises(InputError, match="names that differ"):
        reward_loss(torch.zeros(2, 3), None, [same, same])
    with pytest.raises(InputError, match="names that differ"):
        reward_loss(torch.zeros(2, 3), None, [])
    with pytest.raises(InputError, match="must give a scalar"):
        perceptual_loss(torch.zeros(2, 3), torch.zeros(2, 3), lambda x: x, lambda a, b: (a - b).abs())
