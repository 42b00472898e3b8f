"""Trajectories in memory and on disk, segments, and the schedule of their starts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from limbeck.blocks.trajectories import ABOUT, RangeSchedule, TrajectoryBuffer, TrajectoryWriter, expert_file
from limbeck.core.errors import InputError, RunError


def points(experts: int = 3, epochs: int = 5, size: int = 7) -> torch.Tensor:
    return torch.randn(experts, epochs + 1, size, generator=torch.Generator().manual_seed(0))


def test_snapshots_and_segments_are_copies_of_the_right_rows():
    raw = points()
    buffer = TrajectoryBuffer(list(raw), {"network": "small"})
    assert (buffer.experts, buffer.epochs, buffer.size) == (3, 5, 7)
    assert torch.equal(buffer.snapshot(1, 2), raw[1, 2]) and torch.equal(buffer.snapshot(2, -1), raw[2, 5])
    segment = buffer.segment(2, 1, 3)
    assert torch.equal(segment.points, raw[2, 1:5])
    assert torch.equal(segment.start, raw[2, 1]) and torch.equal(segment.target, raw[2, 4])
    assert torch.equal(buffer.stacked(-1), raw[:, 5])
    assert torch.equal(buffer.subset([2, 0]).stacked(0), raw[[2, 0], 0])
    segment.points.zero_()
    assert torch.equal(buffer.snapshot(2, 1), raw[2, 1])


def test_on_disk_it_is_the_same_and_is_not_read_before_it_is_asked_for(tmp_path):
    raw = points()
    TrajectoryBuffer(list(raw), {"network": "small"}).save(tmp_path / "experts")
    loaded = TrajectoryBuffer.load(tmp_path / "experts")
    assert loaded.about == {"network": "small"}
    assert all(isinstance(e, np.memmap) for e in loaded._experts)
    assert torch.equal(torch.stack([loaded.segment(k, 0, 5).points for k in range(3)]), raw)
    assert sorted(p.name for p in (tmp_path / "experts").iterdir()) == [
        "expert-0000.npy", "expert-0001.npy", "expert-0002.npy", ABOUT,
    ]  # fmt: skip
    segment = loaded.segment(0, 0, 1)
    segment.points.add_(1)  # copies: the file must not change
    assert torch.equal(TrajectoryBuffer.load(tmp_path / "experts").snapshot(0, 0), raw[0, 0])


def test_half_precision_takes_half_the_space_and_keeps_three_digits(tmp_path):
    raw = points(1, 20, 5000)
    buffer = TrajectoryBuffer(list(raw))
    buffer.save(tmp_path / "whole")
    buffer.save(tmp_path / "half", half=True)
    sizes = [expert_file(tmp_path / n, 0).stat().st_size for n in ("whole", "half")]
    assert sizes[1] / sizes[0] == pytest.approx(0.5, abs=0.01)
    found = TrajectoryBuffer.load(tmp_path / "half").snapshot(0, 4)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, raw[0, 4], rtol=1e-3, atol=1e-6)


def test_a_buffer_written_in_two_goes_is_whole_only_when_finished(tmp_path):
    raw = points()
    first = TrajectoryWriter(tmp_path, 3, 5, 7)
    for epoch in range(4):
        first.write(epoch, raw[:, epoch])
    with pytest.raises(RunError, match="no finished trajectories"):
        TrajectoryBuffer.load(tmp_path)
    second = TrajectoryWriter(tmp_path, 3, 5, 7)  # after a crash; epoch 3 comes again
    for epoch in range(3, 6):
        second.write(epoch, raw[:, epoch])
    second.finish({"seed": 1})
    loaded = TrajectoryBuffer.load(tmp_path)
    assert torch.equal(torch.stack([loaded.segment(k, 0, 5).points for k in range(3)]), raw)


def test_files_of_another_shape_or_cut_off_are_begun_again(tmp_path):
    TrajectoryBuffer(list(points(2, 3, 4))).save(tmp_path)
    (tmp_path / ABOUT).unlink()
    expert_file(tmp_path, 1).write_bytes(expert_file(tmp_path, 1).read_bytes()[:60])
    raw = points(2, 5, 7)
    TrajectoryBuffer(list(raw)).save(tmp_path)
    assert torch.equal(TrajectoryBuffer.load(tmp_path).stacked(5), raw[:, 5])


def test_damaged_folders_are_refused(tmp_path):
    TrajectoryBuffer(list(points())).save(tmp_path)
    np.save(expert_file(tmp_path, 1), np.zeros((2, 2)))
    with pytest.raises(RunError, match=r"shape \(2, 2\), not \(6, 7\)"):
        TrajectoryBuffer.load(tmp_path)
    expert_file(tmp_path, 1).write_bytes(b"nothing")
    with pytest.raises(RunError, match="missing or damaged"):
        TrajectoryBuffer.load(tmp_path)


def test_what_is_beyond_the_trajectory_is_named():
    buffer = TrajectoryBuffer(list(points()))
    with pytest.raises(InputError, match="epochs 4 to 6 leave the trajectory, which has 5"):
        buffer.segment(0, 4, 2)
    with pytest.raises(InputError, match="no expert 3"):
        buffer.snapshot(3, 0)
    with pytest.raises(InputError, match="leave the trajectory"):
        buffer.snapshot(0, 6)
    with pytest.raises(InputError, match="leave the trajectory"):
        buffer.snapshot(0, -2)
    with pytest.raises(InputError, match="at least one expert"):
        TrajectoryBuffer([])
    with pytest.raises(InputError, match="of one shape"):
        TrajectoryBuffer([torch.zeros(3, 2), torch.zeros(4, 2)])


def test_the_bound_grows_as_published():
    schedule = RangeSchedule(0, 20, 10, expand_end=1000)
    assert [schedule.upper(i) for i in (0, 99, 100, 500, 999, 1000, 5000)] == [10, 10, 11, 15, 19, 20, 20]
    assert RangeSchedule(3, 8).upper(0) == 8
    assert RangeSchedule(3, 8, 5, 0).upper(0) == 8


def test_starts_are_uniform_within_the_bound():
    schedule = RangeSchedule(2, 6, 3, expand_end=100)
    generator = torch.Generator().manual_seed(0)
    assert {schedule.draw(0, generator) for _ in range(50)} == {2}
    counts = np.bincount([schedule.draw(100, generator) for _ in range(4000)], minlength=7)
    assert counts[:2].sum() == counts[6] == 0
    assert (abs(counts[2:6] - 1000) < 120).all()


def test_ranges_beyond_the_trajectory_are_refused():
    RangeSchedule(0, 9).check(epochs=10, length=2)  # the last segment is 8 to 10
    with pytest.raises(InputError, match=r"need 11 epochs, but the experts have 10.*lower max_start to 9"):
        RangeSchedule(0, 10).check(epochs=10, length=2)
    with pytest.raises(InputError, match="the range is empty"):
        RangeSchedule(5, 5)
    with pytest.raises(InputError, match="above 2 and at most 6"):
        RangeSchedule(2, 6, 2)


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [  # published: CIFAR-10 with 1, 10, 50, 500 images of 5,000, experts of 100 epochs
        (1 / 5000, (0, 5, 5)),
        (10 / 5000, (0, 20, 10)),
        (50 / 5000, (0, 40, 20)),
        (500 / 5000, (40, 65, 65)),
        (0.5, (40, 65, 65)),
    ],
)
def test_the_rule_of_thumb_follows_the_published_ranges(fraction, expected):
    found = RangeSchedule.auto(fraction, 100, 2, 10_000)
    assert (found.min_start, found.max_start, found.cur_max) == expected
    assert found.expand_end == 1000


def test_the_rule_of_thumb_always_fits_the_trajectory():
    for epochs in range(2, 30):
        for fraction in (1e-5, 1e-3, 0.01, 0.03, 0.3, 1.0):
            RangeSchedule.auto(fraction, epochs, 2, 5).check(epochs, 2)
    later = [RangeSchedule.auto(f, 40, 2, 100).max_start for f in (1e-4, 1e-3, 1e-2, 1e-1)]
    assert later == sorted(later) and later[0] < later[-1]
    with pytest.raises(InputError, match="longer than the experts' 2"):
        RangeSchedule.auto(0.1, 2, 3, 100)
