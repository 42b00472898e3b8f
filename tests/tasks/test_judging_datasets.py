import pytest
import torch

from limbeck import networks
from limbeck.blocks.ensembles import Recipe
from limbeck.core.data import TensorData
from limbeck.core.distilled import DistilledDataset
from limbeck.core.errors import InputError
from limbeck.tasks.judging_datasets import JudgingConfig, everything, judge_datasets, train_networks


def build():
    return networks.build("mlp-16", in_shape=(1, 4, 4), num_classes=3)


def samples(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    centre = torch.eye(3).repeat_interleave(6, 1)[:, :16] * 3
    return (centre[y] + torch.randn(n, 16, generator=generator)).view(n, 1, 4, 4), y


def dataset(n=12, **more):
    x, y = samples(n)
    return DistilledDataset(x, y, 3, **more)


def test_networks_learn_and_are_reproducible():
    recipe = Recipe(steps=40, batch_size=12, lr=0.05)
    first = train_networks(dataset(), build, recipe, seeds=2, seed=5)
    state = torch.random.get_rng_state()
    again = train_networks(dataset(), build, recipe, seeds=2, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's random state is left alone
    assert torch.equal(first.theta, again.theta)
    found = first.accuracies(*samples(60, 1))
    assert len(found) == 2 and min(found) > 0.8


def test_accuracy_is_counted_by_hand():
    trained = train_networks(dataset(), build, Recipe(steps=1, lr=1e-9), seeds=1)
    x, y = samples(30, 2)
    said = trained.network(trained.theta[0], x).argmax(1)
    assert trained.accuracies(x, y) == [pytest.approx(float((said == y).float().mean()))]


def test_temperature_of_soft_labels_is_used():
    x, y = samples(12)
    soft = torch.nn.functional.one_hot(y, 3).float()
    plain, warm = (
        train_networks(DistilledDataset(x, soft, 3, recipe=r), build, Recipe(steps=5), seeds=1).theta
        for r in ({}, {"temperature": 4.0})
    )
    assert not torch.allclose(plain, warm)


def test_rows_for_every_contestant_and_network():
    config = JudgingConfig(judge_seeds=2, judge_steps=20, judge_lr=0.05)
    sets = {"distilled": dataset(6, recipe={"lr": 0.2}), "whole set": dataset(60)}
    rows = judge_datasets(sets, {"a": build, "b": build}, samples(30, 3), config, progress=False)
    assert [r["who"] for r in rows] == ["distilled", "whole set"]
    assert set(rows[0]) == {"who", "accuracy", "accuracy_std", "accuracy on b", "samples", "bytes", "lr"}
    assert (rows[0]["lr"], rows[1]["lr"]) == (0.2, 0.05)  # a rate that was distilled is its own data set's alone
    assert rows[1]["bytes"] == 60 * 17 + 8


def test_everything_needs_labels_and_memory():
    x, y = samples(6)
    found = everything(TensorData(x, y))
    assert torch.equal(found[0], x) and torch.equal(found[1], y)
    with pytest.raises(InputError, match="with labels"):
        everything(TensorData(x))
    with pytest.raises(InputError, match="in memory: distil a subset"):
        everything(TensorData(x, y), most_bytes=10)
