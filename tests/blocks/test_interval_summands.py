"""Containers of corner lists."""

from __future__ import annotations

import pytest
import torch

from limbeck.blocks.decomposer import join_summands, read_summands, split_summands, write_summands
from limbeck.blocks.interval_summands import IntervalSummands
from limbeck.core.errors import InputError

torch.set_num_threads(1)
INF = float("inf")
CORNERS = [
    ([[0.0, 1.0], [1.0, 0.0]], [[2.0, 3.0], [3.0, 2.0]]),
    ([[0.0, 0.0]], [[INF, INF]]),
    ([[2.0, 2.0]], [[2.5, 4.0]]),
]


def test_lengths_are_those_of_the_longest_diagonal_bar() -> None:
    summands = IntervalSummands.of(CORNERS, [1, 0, 1])
    # by hand: best pair of the first is ((0, 1), (2, 3)) with min(2, 2) = 2
    assert summands.lengths().tolist() == [2.0, INF, 0.5]
    assert summands.lengths(([0.5, 0.5], [2.0, 4.0])).tolist() == [1.5, 1.5, 0.0]


def test_only_boxes_with_an_interior_are_pairs() -> None:
    pairs = IntervalSummands.of([([[0.0, 1.0], [1.0, 0.0]], [[0.5, 2.0], [2.0, 0.5]])]).pairs()
    assert pairs.births.tolist() == [[0.0, 1.0], [1.0, 0.0]] and pairs.deaths.tolist() == [[0.5, 2.0], [2.0, 0.5]]


def test_parts_clips_and_scales() -> None:
    summands = IntervalSummands.of(CORNERS, [1, 0, 1])
    part = summands.of_degree(1)
    assert len(part) == 2 and part.corners(1)[1].tolist() == [[2.5, 4.0]]
    assert part.corners(0)[0].tolist() == CORNERS[0][0]
    assert len(summands.of_degree(5)) == 0 and summands.of_degree(5).lengths().shape == (0,)
    clipped = summands.clipped(([0.5, 0.5], [3.0, 3.0]))
    assert clipped.corners(1)[0].tolist() == [[0.5, 0.5]] and clipped.corners(1)[1].tolist() == [[3.0, 3.0]]
    scaled = summands.rescaled(([0.0, 1.0], [2.0, 5.0]))
    assert scaled.corners(2)[0].tolist() == [[1.0, 0.25]] and scaled.corners(2)[1].tolist() == [[1.25, 0.75]]
    low, high = summands.bounds()
    assert low.tolist() == [0.0, 0.0] and high.tolist() == [3.0, 4.0]
    assert torch.isnan(IntervalSummands.empty(2).bounds()[0]).all()


def test_bars_are_summands_of_one_parameter() -> None:
    bars = IntervalSummands.bars([[0.0, 1.0], [0.5, INF]], degree=1)
    assert bars.parameters == 1 and bars.lengths(([0.0], [2.0])).tolist() == [1.0, 1.5]
    assert len(IntervalSummands.bars([])) == 0


def test_they_survive_files_and_joining(tmp_path) -> None:
    summands = IntervalSummands.of(CORNERS, [1, 0, 1])
    write_summands(summands, tmp_path / "a.npz")
    again = read_summands(tmp_path / "a.npz")
    assert again is not None
    modules = [summands, IntervalSummands.empty(2), summands.of_degree(0)]
    for kept, made in zip([again, *split_summands(join_summands(modules))], [summands, *modules], strict=True):
        for name, value in made.tensors().items():
            assert torch.equal(kept.tensors()[name], value), name
    (tmp_path / "a.npz").write_bytes(b"PK broken")
    assert read_summands(tmp_path / "a.npz") is None and read_summands(tmp_path / "none.npz") is None
    assert split_summands(join_summands([])) == []


def test_wrong_corners_say_what_is_wrong() -> None:
    with pytest.raises(InputError, match="NaN"):
        IntervalSummands.of([([float("nan"), 0.0], [1.0, 1.0])])
    one, zero = torch.ones(1, 2), torch.tensor([0, 1])
    with pytest.raises(InputError, match="summand 0 has no death corner"):
        IntervalSummands(one, torch.ones(0, 2), zero, torch.tensor([0, 0]), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(InputError, match="death corners 3"):
        IntervalSummands(one, torch.ones(1, 3), zero, zero, torch.zeros(1, dtype=torch.int64))
    with pytest.raises(InputError, match="degrees is missing"):
        IntervalSummands.from_tensors({"births": one, "deaths": one, "birth_ptr": zero, "death_ptr": zero})
    with pytest.raises(InputError, match="upper numbers above"):
        IntervalSummands.of(CORNERS).rescaled(([0.0, 0.0], [0.0, 1.0]))
