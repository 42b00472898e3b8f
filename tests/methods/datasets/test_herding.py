"""Herding as a method."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from limbeck.blocks import coresets
from limbeck.methods.datasets.herding import Herding
from tests.helpers import resumed_equals_uninterrupted
from tests.methods.datasets.selections import build, encoder, images


def test_means_of_the_chosen_follow_the_class_means():
    x, y = images()
    method = Herding((x, y), encoder=encoder(), ipc=5)
    made = method.select()
    features = F.normalize(method.embeddings(), dim=1)
    for c in range(3):
        ids = (y == c).nonzero().flatten()
        own = made.index[made.labels == c]
        assert torch.equal(own, ids[coresets.herding(features[ids], 5)])
        mean = features[ids].mean(0)
        draws = torch.rand(50, 20, generator=torch.Generator().manual_seed(c)).argsort(1)[:, :5]
        chance = (features[ids[draws]].mean(1) - mean).norm(dim=1)
        assert (features[own].mean(0) - mean).norm() < chance.median() / 1.5


def test_rules_differ_on_features_that_are_not_normalised():
    x, y = images()
    rows = torch.randn(60, 4, generator=torch.Generator().manual_seed(3)) * torch.arange(1, 61)[:, None]

    def chosen(**settings):
        return Herding((x, y), embeddings=rows, ipc=4, **settings).select().index

    assert torch.equal(chosen(), chosen(rule="welling"))
    assert not torch.equal(chosen(normalise=False), chosen(normalise=False, rule="welling"))
    ids = (y == 0).nonzero().flatten()
    expected = ids[coresets.herding(rows[ids], 4, "welling")]
    assert torch.equal(chosen(normalise=False, rule="welling")[:4], expected)


def test_one_sample_is_the_one_nearest_to_the_mean():
    x, y = images()
    made = Herding((x, y), ipc=1, normalise=False).select()
    flat = x.flatten(1) - x.flatten(1).mean(0)
    for c in range(3):
        ids = (y == c).nonzero().flatten()
        nearest = ids[(flat[ids] - flat[ids].mean(0)).norm(dim=1).argmin()]
        assert int(made.index[c]) == int(nearest)


def test_resume_is_exact(tmp_path):
    resumed_equals_uninterrupted(
        lambda: Herding(images(), build, encoder(), ipc=3), images(), tmp_path, stops=(1, 2), every=1
    )
