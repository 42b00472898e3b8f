"""New weights for networks that exist: everything is drawn anew, frozen parts stay, what cannot be drawn is named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.blocks.fresh import check_redrawable, redraw
from limbeck.core.errors import InputError


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def test_equal_seeds_give_a_network_that_was_built_with_that_seed() -> None:
    torch.manual_seed(5)
    expected = net()
    found = net()
    found(torch.randn(16, 4))  # moves the running statistics
    torch.manual_seed(5)
    redraw(found)
    for name, value in expected.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name


def test_attention_of_torch_is_drawn_too() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    redraw(layer)
    changed = {k for k, v in layer.state_dict().items() if not torch.equal(v, before[k])}
    assert {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight"} <= changed


def test_frozen_parts_keep_their_weights() -> None:
    model = net()
    model[0].requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    redraw(model)
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[3].weight, before["3.weight"])


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3))
        self.scale = nn.Parameter(torch.ones(3))


class Able(Bare):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.scale)
        nn.init.constant_(self.inner[0].weight, 7.0)


def test_a_parent_has_the_last_word_and_answers_for_its_own_parameters() -> None:
    model = Able()
    redraw(model)
    assert (model.inner[0].weight == 7).all() and not (model.scale == 1).any()


def test_what_cannot_be_drawn_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Bare())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError, match=r"'1\.scale' of Sequential.*give a function that builds the network"):
        redraw(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model[1].scale.requires_grad_(False)
    check_redrawable(model)
