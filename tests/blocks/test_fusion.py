"""Features written out by hand, ratios and their limits, class counts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from limbeck.blocks.classes import class_count
from limbeck.blocks.fusion import (
    FEATURE_SETS,
    RatioController,
    feature_parts,
    trilateral_features,
    weighted_soft_label_ratio,
)
from limbeck.core.errors import InputError, UnknownNameError

S, T = torch.tensor([[0.2, 0.8]]), torch.tensor([[0.6, 0.4]])
G, O = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.3, 0.7]])  # noqa: E741
BY_HAND = {
    "vertices": [0.2, 0.8, 0.6, 0.4, 0.0, 1.0, 0.3, 0.7],
    "edges": [0.01, 0.01, 0.04, 0.04, 0.16, 0.16],
    "angles": [0.4 * -0.2, -0.4 * 0.2, 0.1 * -0.2, -0.1 * 0.2],
    "other edges": [0.36, 0.36, 0.09, 0.09],  # (T-G)², (O-G)²
}


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("option3", ("vertices", "edges", "other edges")),
        ("vertices", ("vertices",)),
        ("edges", ("edges",)),
        ("angles_vertices", ("vertices", "angles")),
        ("edges_angles", ("edges", "angles")),
        ("all", ("vertices", "edges", "angles")),
    ],
)
def test_features_equal_those_by_hand(kind, parts):
    expected = [v for part in parts for v in BY_HAND[part]]
    found = trilateral_features(S, T, G, O, kind)
    torch.testing.assert_close(found, torch.tensor([expected]))
    assert feature_parts(kind) * 2 == len(expected)


def test_ablations_leave_the_class_mean_out():
    for kind, size in (("intra", 6), ("sg_tg", 2)):
        found = trilateral_features(S, T, G, O, kind)
        assert found.shape == (1, 2 * size) and torch.equal(found, trilateral_features(S, T, G, S, kind))
    torch.testing.assert_close(trilateral_features(S, T, G, O, "sg_tg"), torch.tensor([[0.04, 0.04, 0.36, 0.36]]))
    assert {feature_parts(k) for k in FEATURE_SETS} == {2, 3, 4, 5, 6, 9}


def test_the_controller_starts_near_one_half_stays_in_its_range_and_never_loses_its_gradient():
    torch.manual_seed(0)
    controller = RatioController(8, margin=0.01)
    assert (controller(torch.rand(50, 8)) - 0.5).abs().max() < 0.2
    assert [m.out_features for m in controller.layers if isinstance(m, nn.Linear)] == [32, 16, 1]
    last = controller.layers[-1]
    nn.init.zeros_(last.weight)
    assert torch.equal(controller(torch.rand(5, 8)), torch.full((5,), 0.5))
    nn.init.constant_(last.bias, 8.0)
    ratio = controller(torch.rand(5, 8))
    assert bool(((ratio > 0.98) & (ratio < 0.99)).all())
    ratio.sum().backward()
    assert last.bias.grad.abs() > 0


def test_weighted_soft_labels():
    ce_s, ce_t = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.5, 1.0, 0.0])
    expected = torch.tensor([1 - math.exp(-2), 0.0, 1.0])
    torch.testing.assert_close(weighted_soft_label_ratio(ce_s, ce_t), expected)


def test_class_count_is_said_or_read_off_the_last_linear_layer():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 7))
    assert class_count(model, "x") == 7
    model.num_classes = 5
    assert class_count(model, "x") == 5
    with pytest.raises(InputError, match="the controller must know the number of classes.*num_classes=…"):
        class_count(nn.ReLU(), "the controller")


def test_bad_input():
    with pytest.raises(UnknownNameError, match="unknown feature set 'option2'; did you mean option3"):
        feature_parts("option2")
    with pytest.raises(InputError, match="must have the same shape"):
        trilateral_features(S, T, G, torch.rand(1, 3))
