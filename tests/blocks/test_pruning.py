from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.blocks.pruning import Masks, lottery_tickets
from limbeck.core.errors import InputError


@pytest.fixture(autouse=True)
def _quiet() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))


def test_masks_are_of_weights_and_global():
    model = net()
    masks = Masks.full(model)
    assert list(masks.kept) == ["0.weight", "3.weight"] and masks.size == masks.remaining == 72 and masks.sparsity == 0
    pruned = masks.shrunk(model, 0.25)
    assert pruned.remaining == 54 and pruned.sparsity == 0.25
    everything = torch.cat([model[0].weight.flatten(), model[3].weight.flatten()]).abs()
    threshold = everything.sort().values[18]
    for name in masks.kept:
        torch.testing.assert_close(pruned.kept[name], model.get_parameter(name).abs() >= threshold)
    assert masks.remaining == 72  # the first ones are untouched


def test_shares_are_of_what_remains_and_masks_are_nested():
    model = net()
    masks = Masks.full(model)
    counts = []
    for _ in range(4):
        smaller = masks.shrunk(model, 0.2)
        assert all(bool((smaller.kept[n] <= masks.kept[n]).all()) for n in masks.kept)
        masks = smaller
        counts.append(masks.remaining)
        with torch.no_grad():  # what is pruned stays so, however large it becomes
            for name in masks.kept:
                model.get_parameter(name)[~masks.kept[name]] = 100.0
    assert counts == [58, 46, 37, 30]


def test_equal_weights_are_pruned_to_the_exact_number():
    model = nn.Linear(10, 10)
    nn.init.ones_(model.weight)
    assert Masks.full(model).shrunk(model, 0.33).remaining == 67
    assert Masks.full(model).shrunk(model, 0.0).remaining == 100


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_held_weights_stay_zero_whatever_the_optimiser_remembers(kind):
    model = net()
    x, y = torch.randn(20, 6), torch.randint(3, (20,))
    optimizer = (
        torch.optim.Adam(model.parameters(), 0.01) if kind == "adam" else torch.optim.SGD(model.parameters(), 0.1, 0.9)
    )

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    step()
    masks = Masks.full(model).shrunk(model, 0.5)
    handle = masks.hold(model, optimizer)
    for _ in range(3):
        step()
        for name, mask in masks.kept.items():
            weight = model.get_parameter(name)
            assert not bool(weight[~mask].any()) and bool((weight[mask] != 0).all())
    handle.remove()
    step()
    assert any(bool(model.get_parameter(n)[~m].any()) for n, m in masks.kept.items())


def train(model: nn.Module, masks: Masks) -> None:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    y = x[:, :3].argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    masks.hold(model, optimizer)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_tickets_start_from_the_same_weights():
    model = net()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    begun = []

    def watched(trained: nn.Module, masks: Masks) -> None:
        begun.append(trained[0].weight.detach().clone())
        train(trained, masks)

    def norm(trained: nn.Module) -> float:
        return float(trained[0].weight.detach().norm())

    tickets = list(lottery_tickets(model, watched, rounds=3, fraction=0.5, evaluate=norm))
    assert [t.round for t in tickets] == [0, 1, 2, 3]
    assert [t.sparsity for t in tickets] == [0, 0.5, 0.75, 0.875]
    for weight, ticket in zip(begun, tickets, strict=True):
        torch.testing.assert_close(weight, start["0.weight"] * ticket.masks.kept["0.weight"])
    assert tickets[-1].score == pytest.approx(norm(model))
    again = list(lottery_tickets(model, train, rounds=1, fraction=0.5, rewind=start))
    torch.testing.assert_close(again[1].masks.kept["0.weight"], tickets[1].masks.kept["0.weight"])


def test_bad_input():
    model = net()
    with pytest.raises(InputError, match=r"in \[0, 1\)"):
        Masks.full(model).shrunk(model, 1.0)
    with pytest.raises(InputError, match="no parameter 'head'"):
        Masks.full(model, ["head"])
    with pytest.raises(InputError, match="no weights to prune"):
        Masks.full(nn.LayerNorm(3))
    with pytest.raises(InputError, match="'0.weight' of shape"):
        Masks.full(model).apply_(nn.Linear(2, 2))
    with pytest.raises(InputError, match="at least 0"):
        next(lottery_tickets(model, train, rounds=-1))
    with pytest.raises(InputError, match=r"in \(0, 1\)"):
        next(lottery_tickets(model, train, rounds=1, fraction=1.0))

    def careless(trained: nn.Module, masks: Masks) -> None:
        with torch.no_grad():
            trained[0].weight.add_(1.0)
            trained[3].weight.add_(1.0)

    with pytest.raises(InputError, match="hold the masks"):
        list(lottery_tickets(model, careless, rounds=1))
