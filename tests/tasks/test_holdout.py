"""Parts of training data: disjoint, stratified, with the whole set's ids, held-out ones never augmented."""

from __future__ import annotations

import pytest
import torch

from limbeck.core.data import TensorData
from limbeck.core.errors import InputError
from limbeck.tasks.augment import ShiftFlip
from limbeck.tasks.holdout import Part, hold_out


def images(n: int = 40) -> TensorData:
    x = (torch.arange(n * 16) % 251).view(n, 1, 4, 4).to(torch.uint8)
    return TensorData(x, torch.arange(n) % 4, augment=ShiftFlip(2), seed=1)


def test_parts_are_disjoint_complete_and_stratified():
    rest, held = hold_out(images(), 0.3, seed=5)
    assert sorted([*rest.ids.tolist(), *held.ids.tolist()]) == list(range(40))
    assert len(held) == 12 and torch.bincount(held.labels_tensor()).tolist() == [3, 3, 3, 3]
    again, other = hold_out(images(), 0.3, seed=5)[1], hold_out(images(), 0.3, seed=6)[1]
    assert torch.equal(again.ids, held.ids) and not torch.equal(other.ids, held.ids)


def test_batches_carry_ids_of_the_whole_set_and_held_out_samples_are_plain():
    data = images()
    rest, held = hold_out(data, 0.25, seed=0)
    batch = rest.fetch(torch.tensor([0, 3]), 7)
    assert torch.equal(batch.index, rest.ids[[0, 3]]) and torch.equal(batch.labels, data.labels[rest.ids[[0, 3]]])
    torch.testing.assert_close(batch.inputs, data.fetch(batch.index, 7).inputs)
    torch.testing.assert_close(held.fetch(torch.arange(4), 7).inputs, data.fetch(held.ids[:4], None).inputs)
    assert rest.augmented and not held.augmented and rest.replayable


def test_soft_labels_and_none_are_split_at_random():
    for labels in (torch.softmax(torch.randn(20, 3), -1), None):
        rest, held = hold_out(TensorData(torch.randn(20, 2), labels), 0.2, seed=0)
        assert len(rest) == 16 and len(held) == 4


def test_each_part_gets_at_least_one_sample():
    assert [len(p) for p in hold_out(TensorData(torch.randn(3, 2)), 0.01, 0)] == [2, 1]
    assert [len(p) for p in hold_out(TensorData(torch.randn(3, 2)), 0.99, 0)] == [1, 2]


def test_bad_input_is_one_line():
    with pytest.raises(InputError, match=r"between 0 and 1 \(got 1\)"):
        hold_out(images(), 1.0, 0)
    with pytest.raises(InputError, match="one sample cannot be divided"):
        hold_out(TensorData(torch.randn(1, 2)), 0.5, 0)
    with pytest.raises(InputError, match="at least one sample"):
        Part(images(), torch.arange(0))
