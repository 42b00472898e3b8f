"""Targets of one step, and the store of segments."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from limbeck.core.data import Stream
from limbeck.core.errors import InputError, RunError
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.schedules import EDM, Flow, Trig, VPCosine, VPDiscrete
from limbeck.diffusion.segments import SegmentStore, step_target, two_step_target
from limbeck.diffusion.solvers import ddim_step
from limbeck.diffusion.step_sizes import jump_costs
from tests.diffusion.test_step_sizes import noise, ring

torch.set_num_threads(1)


@pytest.mark.parametrize("schedule", [Flow(), EDM(), VPDiscrete(), VPCosine(), Trig()], ids=repr)
def test_a_step_of_ddim_with_the_target_arrives(schedule):
    generator = torch.Generator().manual_seed(0)
    x_t, x_s = (torch.randn(3, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    t = schedule.t_max * torch.tensor([0.2, 0.7, 1.0], dtype=torch.float64)
    s = torch.tensor([0.0, 0.3, 0.99], dtype=torch.float64) * t
    x0 = step_target(x_t, x_s, t, s, schedule)
    torch.testing.assert_close(ddim_step(x_t, x0, t, s, schedule), x_s, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(x0[0], x_s[0])  # to clean data: the end itself


def test_the_target_of_a_flow_is_the_slope():
    from limbeck.diffusion.predictions import convert

    x_t, x_s = noise(4, dtype=torch.float64), noise(4, 1, dtype=torch.float64)
    t, s = torch.tensor([1.0, 0.9, 0.5, 0.1]).double(), torch.tensor([0.8, 0.1, 0.4, 0.0]).double()
    found = convert(step_target(x_t, x_s, t, s, Flow()), "x0", "flow", x_t, t, Flow())
    slope = (x_s.numpy() - x_t.numpy()) / (s - t).numpy()[:, None]
    np.testing.assert_allclose(found.numpy(), slope, atol=1e-12)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_two_steps_of_the_teacher_equal_one_with_their_target(guidance):
    teacher = ring(schedule=VPCosine(), labels=True)
    x, cond = noise(5, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 0])
    t, middle, s = (torch.full((5,), v, dtype=torch.float64) for v in (0.75, 0.5, 0.25))
    target = two_step_target(teacher, x, t, middle, s, cond, guidance)
    half = ddim_step(x, teacher.predict(x, t, cond, "x0", guidance), t, middle, VPCosine())
    whole = ddim_step(half, teacher.predict(half, middle, cond, "x0", guidance), middle, s, VPCosine())
    torch.testing.assert_close(ddim_step(x, target, t, s, VPCosine()), whole)
    assert not target.requires_grad


def filled(folder=None, half: bool = False, cond: bool = True) -> tuple[SegmentStore, torch.Tensor]:
    teacher = ring(labels=cond)
    costs = jump_costs(teacher, noise(8), 20)
    store = SegmentStore(6, (2,), (2, 4), folder, half)
    store.plan({k: costs.schedule(k) for k in (2, 4)})
    labels = torch.arange(6) % 2 if cond else None
    solution = Sampler(teacher, costs.anchors).sample(noise(6, 3), labels, record=True)
    store.write(0, solution.states[:, :4], None if labels is None else labels[:4])
    store.write(4, solution.states[:, 4:], None if labels is None else labels[4:])
    return store, solution.states


@pytest.mark.parametrize("steps", [2, 4])
def test_segments_are_the_teachers_states_at_the_schedules_times(steps):
    store, states = filled()
    pool = store.segments(steps)
    assert len(pool) == 6 * steps
    found = pool.fetch(torch.arange(6 * steps), None).inputs
    indices, times = store.indices[steps], store.times[steps]
    for i in range(6 * steps):
        path, place = divmod(i, steps)
        assert torch.equal(found["x_t"][i], states[indices[place], path])
        assert torch.equal(found["x_s"][i], states[indices[place + 1], path])
        assert found["t"][i] == times[place] and found["s"][i] == times[place + 1]
        assert found["cond"][i] == path % 2
    assert found["s"].min() == 0 and found["t"].max() == 1


def test_a_pass_shows_each_segment_once():
    pool = filled()[0].segments(4)
    stream = Stream(pool, 8, seed=0)
    seen = torch.cat([stream.batch(i).inputs["t"] for i in range(3)])
    assert torch.unique(seen, return_counts=True)[1].tolist() == [6, 6, 6, 6]
    assert "cond" not in filled(cond=False)[0].segments(2).fetch(torch.arange(2), None).inputs


def test_a_store_on_disk_goes_on_where_it_was(tmp_path):
    store, _ = filled(tmp_path, half=True)
    memory, _ = filled()
    state = store.state_dict()
    assert "states" not in state
    other = SegmentStore(6, (2,), (2, 4), tmp_path, True)
    other.load_state_dict(state)
    a, b = (s.segments(4).fetch(torch.arange(24), None).inputs for s in (other, memory))
    torch.testing.assert_close(a["x_t"], b["x_t"], atol=2e-3, rtol=1e-3)
    assert a["x_t"].dtype == torch.float32
    copy = SegmentStore(6, (2,), (2, 4))
    copy.load_state_dict(memory.state_dict())
    assert torch.equal(
        copy.segments(2).fetch(torch.arange(12), None).inputs["x_s"], memory.states[:, [1, -1]].flatten(0, 1)
    )
    with pytest.raises(RunError, match="give another folder"):
        SegmentStore(7, (2,), (2, 4), tmp_path, True)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: SegmentStore(0, (2,), (2,)), "at least one trajectory"),
        (lambda: SegmentStore(3, (2,), (2, 2)), "must be different and at least 1"),
        (lambda: SegmentStore(3, (2,), ()), "must be different and at least 1"),
        (lambda: SegmentStore(3, (2,), (2,)).write(0, torch.zeros(3, 1, 2)), "no plan yet"),
        (lambda: filled()[0].segments(3), "3 steps were not harvested: there are 2, 4"),
        (
            lambda: SegmentStore(3, (2,), (3,)).plan({2: jump_costs(ring(), noise(2), 5).schedule(2)}),
            "the store is for",
        ),
    ],
)
def test_errors_name_the_remedy(call, line):
    with pytest.raises(InputError, match=line):
        call()


def test_unmade_and_broken_trajectories_are_refused():
    costs = jump_costs(ring(), noise(2), 5)
    store = SegmentStore(3, (2,), (2,))
    store.plan({2: costs.schedule(2)})
    with pytest.raises(InputError, match="trajectory 2 was not made yet: there are 0"):
        store.segments(2).fetch(torch.tensor([5]), None)
    with pytest.raises(RunError, match="NaN or infinity"):
        store.write(0, torch.full((6, 1, 2), torch.nan))
