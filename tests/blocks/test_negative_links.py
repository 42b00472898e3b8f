from __future__ import annotations

import pytest
import torch

from limbeck.blocks.negative_links import UnlinkedPairs
from limbeck.core.errors import InputError


@pytest.mark.parametrize("missing", [10, 170])
def test_pairs_are_unlinked_and_uniform(missing: int) -> None:
    every = torch.combinations(torch.arange(20)).T  # 190 pairs
    links = every[:, torch.randperm(190, generator=torch.Generator().manual_seed(0))][:, missing:]
    pairs = UnlinkedPairs(20, links).sample(20_000, torch.Generator().manual_seed(1))
    assert pairs.shape == (20_000, 2)
    keys = pairs[:, 0] * 20 + pairs[:, 1]
    assert not bool(torch.isin(keys, torch.cat([links[0] * 20 + links[1], links[1] * 20 + links[0]])).any())
    counts = torch.unique(keys, return_counts=True)[1]
    assert len(counts) == 2 * missing  # both orders of each
    expected = 20_000 / (2 * missing)
    assert float((counts - expected).abs().max()) < 6 * expected**0.5


def test_pairs_of_two_sides() -> None:
    sides = torch.tensor([0] * 3 + [1] * 200)
    links = torch.stack([torch.zeros(200, dtype=torch.long), torch.arange(3, 203)])
    pairs = UnlinkedPairs(203, links, sides).sample(500)
    assert bool((sides[pairs[:, 0]] != sides[pairs[:, 1]]).all()) and not bool((pairs == 0).any())


def test_a_complete_graph_has_none() -> None:
    with pytest.raises(InputError, match="no pair is left to predict"):
        UnlinkedPairs(5, torch.combinations(torch.arange(5)).T)
    with pytest.raises(InputError, match="numbered 0 to 2"):
        UnlinkedPairs(3, torch.tensor([[0], [3]]))
