"""Scores of pairs against equations by hand; copies, seeds, dead candidates."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.blocks.gaussian_init import gaussian_copy
from limbeck.core.batch import Batch
from limbeck.core.data import TensorData
from limbeck.core.errors import InputError, UnknownNameError
from limbeck.core.method import fingerprint
from limbeck.metrics.distillability import (
    PAIR_SCORES,
    PairScorer,
    draw_batches,
    pair_scores,
    respond,
)
from limbeck.networks import build


def digits(name: str) -> nn.Module:
    return build(name, in_shape=(1, 8, 8), num_classes=10)


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(torch.randn(24, 1, 8, 8, generator=generator), torch.arange(24) % 10)


def test_a_response_is_that_of_the_gaussian_copy(batch):
    network = digits("stageresnet-1-1-1-w4")
    before = fingerprint(network)
    found = respond(network, batch.inputs, batch.labels, seed=3)
    assert fingerprint(network) == before and network.training
    copied = gaussian_copy(network, 3).train()
    z = copied(batch.inputs)
    F.cross_entropy(z, batch.labels).backward()
    torch.testing.assert_close(found.logits, z)
    torch.testing.assert_close(found.gradient, copied.head.weight.grad)
    assert found.features.shape == (24, 16, 2, 2) and not found.features.requires_grad
    own = respond(network, batch.inputs, batch.labels, init="own")
    torch.testing.assert_close(own.logits, network(batch.inputs))


def test_relation_and_semantic_by_hand(batch):
    one, two = (
        respond(digits(n), batch.inputs, batch.labels, seed=1) for n in ("stageresnet-1-1-1-w4", "cell-444444-w4")
    )
    found = pair_scores(
        one, two, "relation", "semantic", "sp", "kd", "pkt", "cc", "rkd-distance", "rkd-angle", "at", "ickd", "fitnet"
    )

    def gram(features):
        flat = features.flatten(1)
        return F.normalize(flat @ flat.T, dim=1)

    assert found["relation"] == pytest.approx(-float((gram(one.features) - gram(two.features)).square().sum()) / 24**2)
    assert found["sp"] == found["relation"]

    def outer(g):
        return F.normalize(g[:, :, None] * g[:, None, :], dim=2)

    expected = -float((outer(one.gradient) - outer(two.gradient)).square().sum()) / (10 * 16)
    assert found["semantic"] == pytest.approx(expected, rel=1e-4)
    assert all(math.isfinite(v) and v <= 0 for v in found.values())
    same = pair_scores(one, one, *PAIR_SCORES)
    assert all(abs(v) < 1e-6 for v in same.values())


def test_widths_may_differ(batch):
    one, two = (respond(digits(n), batch.inputs, batch.labels) for n in ("cell-444444-w4", "cell-444444-w8"))
    assert -4 <= pair_scores(one, two, "semantic")["semantic"] < 0
    with pytest.raises(InputError, match="project"):
        pair_scores(one, two, "ickd")


def test_what_says_nothing_is_dead(batch):
    dead = respond(digits("cell-111111-w4"), batch.inputs, batch.labels)
    alive = respond(digits("cell-222222-w4"), batch.inputs, batch.labels)
    assert dead.dead and not alive.dead
    assert pair_scores(dead, alive, "relation", "semantic") == {"relation": -math.inf, "semantic": -math.inf}
    huge = nn.Sequential(nn.Flatten(), *[nn.Linear(64, 64) for _ in range(60)], nn.Linear(64, 10))
    assert respond(huge, batch.inputs, batch.labels).dead  # without norms N(0, 1) overflows
    with pytest.raises(InputError, match="teacher_init own"):
        PairScorer(huge, [batch])


def test_a_scorer_averages_over_repeats_and_does_not_remember(batch):
    data = TensorData(batch.inputs, batch.labels)
    batches = draw_batches(data, 16, 3, seed=5)
    assert len({tuple(b.index.tolist()) for b in batches}) == 3
    scorer = PairScorer(digits("cell-444444-w4-n2"), batches, seed=7)
    first = scorer(digits("cell-424242-w4"), 1, 2)
    scorer(digits("cell-222222-w4"), 3)
    assert scorer(digits("cell-424242-w4"), 1, 2) == first
    assert scorer(digits("cell-424242-w4"), 2, 1) != first
    single = [scorer(digits("cell-424242-w4"), 1, 2, repeats=range(n, n + 1)) for n in range(3)]
    assert first["semantic"] == pytest.approx(sum(s["semantic"] for s in single) / 3)


def test_soft_labels_and_mixed_widths(batch):
    soft = Batch(batch.inputs, F.one_hot(batch.labels, 10).float())
    hard, teacher = PairScorer(digits("cell-444444-w4"), [batch]), digits("cell-444444-w4")
    assert PairScorer(teacher, [soft])(digits("cell-222222-w4"), 1) == hard(digits("cell-222222-w4"), 1)
    with pytest.warns(UserWarning, match="set compare to classes"):
        hard(digits("cell-222222-w8"), 1)
    fair = PairScorer(teacher, [batch], compare="classes")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fair(digits("cell-222222-w4"), 1)
        fair(digits("cell-222222-w8"), 1)


def test_mistakes_are_named(batch):
    one = respond(digits("cell-222222-w4"), batch.inputs, batch.labels)
    with pytest.raises(UnknownNameError, match="score 'sematic'"):
        pair_scores(one, one, "sematic")
    other = respond(build("cell-222222-w4", in_shape=(1, 8, 8), num_classes=11), batch.inputs, batch.labels)
    with pytest.raises(InputError, match=r"\(24, 10\) and the teacher \(24, 11\)"):
        pair_scores(one, other, "relation")
    with pytest.raises(InputError, match="no labels"):
        PairScorer(digits("cell-222222-w4"), [Batch(batch.inputs)])
