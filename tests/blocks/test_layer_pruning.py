"""Pruned layers of a network: masks that only shrink, gradients and weights that obey them, the solver block by block."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.blocks.held_masks import HeldMasks
from limbeck.blocks.layer_pruning import LayerPruner
from limbeck.blocks.one_shot_pruning import Pattern
from limbeck.blocks.transformer_blocks import Block
from limbeck.core.batch import Batch
from limbeck.core.errors import InputError


def made(**options: object) -> tuple[nn.Sequential, HeldMasks, LayerPruner]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    return net, *pruner_of(net, **options)


def pruner_of(net: nn.Module, **options: object) -> tuple[HeldMasks, LayerPruner]:
    layers = {name: net.get_submodule(name) for name in ("0", "2")}
    held = HeldMasks(net, [f"{name}.weight" for name in layers])
    return held, LayerPruner(net, layers, held, **options)


def test_layers_are_cut_alike_and_others_left_alone() -> None:
    net, held, pruner = made()
    before = net[4].weight.clone()
    pruner.prune(Pattern(0.75))
    assert held.by_name() == {"0.weight": 0.75, "2.weight": 0.75}
    assert held.sparsity == 0.75
    assert torch.equal(net[0].weight != 0, held["0.weight"])
    assert torch.equal(net[4].weight, before)


def test_gradients_and_weights_stay_zero_under_momentum_and_decay() -> None:
    net, held, pruner = made()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.1)
    x = torch.randn(16, 8)
    for _ in range(2):  # momentum from before the pruning
        net(x).square().sum().backward()
        optimizer.step()
    pruner.prune(Pattern(0.5))
    handle = pruner.hold(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        assert not net[0].weight.grad[~held["0.weight"]].any()
        assert net[0].weight.grad[held["0.weight"]].all()
        optimizer.step()
        assert not net[0].weight[~held["0.weight"]].any()
    pruner.prune(Pattern(0.75))  # the hooks see masks that shrink
    optimizer.zero_grad()
    net(x).square().sum().backward()
    assert not net[0].weight.grad[~held["0.weight"]].any()
    handle.remove()
    held.release()
    optimizer.step()
    assert net[0].weight[~held["0.weight"]].any()


def test_masks_only_shrink_and_travel_in_state_dicts() -> None:
    net, held, pruner = made()
    pruner.prune(Pattern(0.5))
    with pytest.raises(InputError, match=r"pruned weights of '0.weight' would come back"):
        held.put({"0.weight": torch.ones(8, 8, dtype=torch.bool)})
    other = HeldMasks(net, ["0.weight", "2.weight"])
    other.load_state_dict(held.state_dict())
    assert torch.equal(other["2.weight"], held["2.weight"])
    assert pruner.layers.keys() == {"0", "2"}


def test_a_student_that_comes_sparser_keeps_its_zeros() -> None:
    net, held, pruner = made()
    with torch.no_grad():
        net[0].weight[:, :6] = 0
        net[2].weight.zero_()  # an initialisation, say
    pruner.prune(Pattern(0.5))
    assert held.by_name() == {"0.weight": 0.75, "2.weight": 0.5}


def test_the_solver_sees_the_blocks_before_as_they_are_now() -> None:
    net, held, pruner = made(blocks=[Block("0"), Block("2")], solver="obc", damp=0.01, columns=8)
    assert pruner.groups == [["0"], ["2"]]
    x = torch.randn(64, 8)
    dense = net(x).detach()
    seen = []
    handle = net[2].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    pruner.prune(Pattern(0.5), [Batch(x[:40]), Batch(x[40:])])
    handle.remove()
    torch.testing.assert_close(torch.cat(seen[-2:]), net[1](net[0](x)))
    assert held.by_name() == {"0.weight": 0.5, "2.weight": 0.5}
    assert not torch.equal(dense, net(x))
    with pytest.raises(InputError, match="needs calibration batches"):
        pruner.prune(Pattern(0.75))
