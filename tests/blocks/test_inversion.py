"""The inversion loss, and the order in which class batches are worked off."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.blocks.bn_statistics import StatisticsDistance
from limbeck.blocks.inversion import ClassBatch, Inversion, block_rows, blocks_of, class_batches
from limbeck.blocks.views import RandomView
from limbeck.core.errors import InputError

torch.set_num_threads(1)


def test_every_class_batch_has_its_own_terms():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    view = RandomView((0.3, 1.0), jitter=2)
    inversion = Inversion(teacher, StatisticsDistance(teacher), view)
    x, y = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    parameters = view.draw(2, torch.Generator().manual_seed(0))
    ce, distance = inversion(x, y, parameters)
    for g in range(2):
        part = slice(3 * g, 3 * g + 3)
        shown = view.apply(x[part], parameters[g : g + 1])
        torch.testing.assert_close(ce[g], F.cross_entropy(teacher(shown), y[part]))
        at = teacher[0](shown)
        expected = (at.mean((0, 2, 3)) - 0).norm() + (at.var((0, 2, 3), correction=0) - 1).norm()
        torch.testing.assert_close(distance[g], 10 * expected, atol=1e-4, rtol=1e-4)


def test_class_batches_hold_every_id_of_every_class_once():
    batches = class_batches(10, 3, 4)
    assert [len(b) for b in batches[:3]] == [3, 4, 3] and len(batches) == 9
    blocks = blocks_of(batches, 8)
    assert all(len({len(b) for b in block}) == 1 for block in blocks)
    assert all(sum(map(len, block)) <= 8 for block in blocks)
    rows = torch.cat([block_rows(block, 3)[0] for block in blocks])
    assert sorted(rows.tolist()) == list(range(30))
    assert blocks_of(class_batches(10, 2, 10), 3) == [[ClassBatch(0, 0, 10)], [ClassBatch(1, 0, 10)]]


def test_rows_are_where_a_set_sorted_by_class_has_them():
    rows, classes = block_rows([ClassBatch(1, 0, 2), ClassBatch(0, 2, 4)], 2)
    assert classes.tolist() == [0, 1, 2, 3]
    assert rows.tolist() == [1, 3, 4, 6]


def test_a_batch_of_one_class_is_refused():
    with pytest.raises(InputError, match="at least two classes"):
        class_batches(10, 1, 1)
