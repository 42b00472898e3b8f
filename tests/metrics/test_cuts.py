from __future__ import annotations

import math

import pytest
import torch

from limbeck.core.errors import InputError
from limbeck.metrics.cuts import cut_consistency


def test_it_is_the_ratio_of_traces() -> None:
    edges = torch.randint(6, (2, 9), generator=torch.Generator().manual_seed(0))
    both = torch.unique(torch.cat([edges, edges.flip(0)], 1), dim=1)
    a = torch.zeros(6, 6).double()
    a[both[0], both[1]] = 1
    y = torch.softmax(torch.randn(6, 3).double(), 1)
    expected = (y.T @ a @ y).trace() / (y.T @ a.sum(1).diag() @ y).trace()
    assert cut_consistency(y, both) == pytest.approx(float(expected))


def test_its_limits() -> None:
    edges = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]])
    assert cut_consistency(torch.eye(2).repeat_interleave(2, 0), edges) == pytest.approx(1)
    assert cut_consistency(torch.eye(2).repeat(2, 1), edges) == pytest.approx(0)
    assert math.isnan(cut_consistency(torch.eye(2), edges[:, :0]))
    with pytest.raises(InputError, match="nodes, classes"):
        cut_consistency(torch.zeros(4), edges)
