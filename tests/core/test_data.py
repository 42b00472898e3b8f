"""Data and streams: every batch is a function of seed and step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from limbeck.core.batch import Batch, Losses, logits_of
from limbeck.core.data import MapData, Stream, TensorData, as_data, mix_seed
from limbeck.core.errors import InputError
from limbeck.tasks.augment import ShiftFlip


def images(n: int = 20, **settings) -> TensorData:
    generator = torch.Generator().manual_seed(0)
    return TensorData(
        (torch.rand(n, 1, 6, 6, generator=generator) * 255).to(torch.uint8), torch.arange(n) % 3, **settings
    )


def test_a_batch_depends_on_seed_and_step_alone():
    a, b = Stream(images(augment=ShiftFlip(1)), 4, seed=3), Stream(images(augment=ShiftFlip(1)), 4, seed=3)
    for _ in range(3):
        b.batch(17)
    later = [b.batch(s) for s in (9, 2, 13)]
    for step, batch in zip((9, 2, 13), later, strict=True):
        assert torch.equal(a.batch(step).inputs, batch.inputs)
        assert torch.equal(a.batch(step).index, batch.index)
    assert not torch.equal(Stream(images(), 4, seed=4).batch(0).index, a.batch(0).index)


def test_an_epoch_shows_every_sample_once():
    stream = Stream(images(), 4, seed=0)
    for epoch in range(2):
        seen = torch.cat([stream.batch(epoch * 5 + i).index for i in range(5)])
        assert sorted(seen.tolist()) == list(range(20))


def test_shards_make_up_the_batch():
    whole = Stream(images(), 8, seed=1)
    parts = [whole.shard(rank, 2).batch(3).index for rank in range(2)]
    assert torch.equal(torch.cat(parts), whole.batch(3).index)


def test_views_are_replayed_and_differ():
    data = images(augment=ShiftFlip(2))
    ids = torch.arange(20)
    assert torch.equal(data.fetch(ids, 5).inputs, data.fetch(ids, 5).inputs)
    assert not torch.equal(data.fetch(ids, 5).inputs, data.fetch(ids, 6).inputs)
    # A sample's view does not depend on what else is in the batch.
    assert torch.equal(data.fetch(ids, 5).inputs[7], data.fetch(torch.tensor([7]), 5).inputs[0])
    stream = Stream(data, 20, views=2)
    assert [stream.batch(s).view for s in range(5)] == [0, 1, 0, 1, 0]
    assert [Stream(images(), 20).batch(s).view for s in range(3)] == [0, 0, 0]


def test_shift_equals_moving_the_pixels():
    x = torch.arange(36.0).reshape(1, 1, 6, 6) + 1
    moved = ShiftFlip(2).apply(x, torch.tensor([[1, -2, 0]]))
    expected = torch.zeros_like(x)
    expected[..., :5, 2:] = x[..., 1:, :4]
    assert torch.equal(moved, expected)
    assert torch.equal(ShiftFlip(0, flip=True).apply(x, torch.tensor([[0, 0, 1]])), x.flip(-1))
    assert torch.equal(ShiftFlip(3).apply(x, torch.tensor([[0, 0, 0]])), x)


def test_normalisation():
    data = images(mean=[0.5], std=[0.25])
    expected = (data.inputs[:2].float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(data.fetch(torch.arange(2), None).inputs, expected)


def test_what_users_have_becomes_data():
    x, y = torch.randn(10, 3), torch.arange(10) % 2
    assert torch.equal(as_data((x, y)).fetch(torch.tensor([4]), None).inputs[0], x[4])
    assert torch.equal(as_data((x.numpy(), y.numpy())).labels_tensor(), y)
    mapped = as_data(DataLoader(TensorDataset(x, y), batch_size=3))
    batch = mapped.fetch(torch.tensor([1, 5]), None)
    assert torch.equal(batch.inputs, x[[1, 5]]) and torch.equal(batch.labels, y[[1, 5]])
    rows = as_data([{"input_ids": torch.tensor([i, i]), "labels": torch.tensor(i)} for i in range(4)])
    assert rows.fetch(torch.tensor([2]), None).inputs["input_ids"].tolist() == [[2, 2]]


class Endless(IterableDataset):
    def __iter__(self):
        yield from range(3)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: TensorData(torch.zeros(0, 2)), "the data set is empty"),
        (lambda: TensorData(torch.zeros(3, 2), torch.zeros(2)), "3 inputs but 2 labels"),
        (lambda: TensorData(torch.tensor([[0.0], [float("nan")]])), r"NaN or infinity \(first in sample 1\)"),
        (lambda: as_data(DataLoader(Endless())), "cannot be resumed"),
        (lambda: as_data(3), "not int"),
        (lambda: MapData([]), "the data set is empty"),
        (lambda: Batch.of("x"), "not str"),
        (lambda: logits_of({"x": 1}), "no logits in a model's output of type dict"),
        (lambda: Losses(x=torch.zeros(3)), r"loss term 'x' has shape \(3,\)"),
    ],
)
def test_bad_input_is_named(make, line):
    with pytest.raises(InputError, match=line):
        make()


def test_losses_sum_their_weighted_terms():
    losses = Losses(a=torch.tensor(2.0), b=(0.5, torch.tensor(4.0)), c=(0.0, torch.tensor(float("inf"))))
    assert losses.total.item() == 4.0
    assert dict(losses)["b"].item() == 4.0


def test_chunks_cover_the_batch():
    batch = Batch(torch.arange(10), torch.arange(10), torch.arange(10), 3)
    parts = batch.chunks(3)
    assert torch.cat([p.inputs for p in parts]).tolist() == list(range(10)) and all(p.view == 3 for p in parts)


def test_mixed_seeds_do_not_collide():
    seeds = {mix_seed(a, b) for a in range(50) for b in range(50)}
    assert len(seeds) == 2500 and all(0 <= s < 2**63 for s in seeds)
    assert np.std([s / 2**63 for s in seeds]) == pytest.approx(1 / 12**0.5, rel=0.05)
