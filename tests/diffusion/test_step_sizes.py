"""Jump costs, shortest paths, schedules, and their form for diffusers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from limbeck.core.errors import InputError, RunError, UnknownNameError
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.oracles import Oracle, gaussian_mixture
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.schedules import EDM, Flow, Schedule, Trig, VPCosine, VPDiscrete
from limbeck.diffusion.solvers import ddim_step
from limbeck.diffusion.step_sizes import (
    JumpCosts,
    bellman_paths,
    bellman_schedule,
    jump_cost_matrix,
    jump_costs,
    to_diffusers,
)

torch.set_num_threads(1)

SCHEDULES = [Flow(), Flow(3.0), EDM(0.002, 20.0), VPDiscrete(), VPCosine(), Trig()]


def ring(radius: float = 0.3, std: float = 0.02, schedule: Schedule | None = None, labels: bool = False) -> Oracle:
    angle = torch.arange(8) * (2 * math.pi / 8)
    means = radius * torch.stack([angle.cos(), angle.sin()], 1)
    return gaussian_mixture(means, std, labels=torch.arange(8) % 2 if labels else None, schedule=schedule)


def noise(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- the cost matrix -----------------------------------------------------------------------------------------------------


def test_costs_of_a_flow_equal_the_published_formula():
    teacher = ring()
    grid = torch.linspace(1, 0, 9, dtype=torch.float64)
    found = jump_costs(teacher, noise(5, dtype=torch.float64), grid)
    x = noise(5, dtype=torch.float64)
    states, slopes = [x.numpy()], []
    for t, s in itertools.pairwise(grid.tolist()):
        slopes.append(((x - teacher.predict(x, t)) / t).numpy())
        x = x + (s - t) * torch.from_numpy(slopes[-1])
        states.append(x.numpy())
    for i in range(8):
        for j in range(9):
            if j <= i:
                assert found.values[i, j] == math.inf
                continue
            jump = states[i] + (float(grid[j]) - float(grid[i])) * slopes[i]
            expected = 0.0 if j == i + 1 else np.square(jump - states[j]).sum(1).mean()
            assert found.values[i, j].item() == pytest.approx(expected, rel=1e-9, abs=1e-14)
    assert found.probes == 5 and found.intervals == 8


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_costs_equal_steps_of_ddim_from_the_teachers_states_in_every_schedule(schedule):
    teacher = ring(schedule=schedule)
    grid = schedule.times(6)
    z = noise(4, dtype=torch.float64)
    states = Sampler(teacher, grid).sample(z, record=True).states
    found = jump_costs(teacher, z, grid).values
    for i, j in [(0, 2), (0, 6), (1, 3), (3, 6), (4, 6)]:
        x0 = teacher.predict(states[i], float(grid[i]))
        made = ddim_step(states[i], x0, float(grid[i]), float(grid[j]), schedule)
        unit = float(schedule.alpha(grid[j]) + schedule.sigma(grid[j]))
        expected = ((made - states[j]) / unit).square().flatten(1).sum(1).mean()
        assert found[i, j].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-8)


def test_a_distance_of_ones_own_and_chunks_change_nothing():
    teacher = ring()
    z = noise(7)
    whole = jump_costs(teacher, z, 12)
    parts = jump_costs(teacher, z, 12, chunk=60)  # two probes at once
    torch.testing.assert_close(whole.values, parts.values, rtol=1e-5, atol=1e-9)
    assert parts.probes == 7

    def squares(made: Tensor, wanted: Tensor) -> Tensor:
        return (made - wanted).square().flatten(1).sum(1)

    same = jump_costs(teacher, z, 12, cost=squares, chunk=60)
    torch.testing.assert_close(whole.values, same.values, rtol=1e-4, atol=1e-7)
    far = jump_costs(teacher, z, 12, cost=lambda made, wanted: (made - wanted).abs().flatten(1).amax(1))
    assert not torch.allclose(far.values[0, 2:], whole.values[0, 2:])


class Straight(nn.Module):
    """Velocity that depends on the start only: x_t = z + (1 - t) * shift."""

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        return torch.full_like(x, -0.7)


def test_a_straight_flow_costs_nothing():
    denoiser = Denoiser(Straight(), Flow(time_scale=1.0), "flow")
    found = jump_costs(denoiser, noise(6, dtype=torch.float64), 10).values
    assert found[torch.isfinite(found)].max() < 1e-14


def test_guidance_and_conditions_reach_the_trajectories():
    teacher = ring(labels=True)
    z, cond = noise(6), torch.tensor([0, 1, 0, 1, 0, 1])
    plain, guided = jump_costs(teacher, z, 8, cond=cond), jump_costs(teacher, z, 8, cond=cond, guidance=3.0)
    free = jump_costs(teacher, z, 8)
    assert not torch.allclose(plain.values, guided.values) and not torch.allclose(plain.values, free.values)
    before = teacher.evaluations
    bellman_schedule(teacher, 2, (2,), anchors=8, probes=6, conditions=cond, guidance=3.0)
    assert teacher.evaluations - before == 16


def test_costs_are_those_of_the_same_teacher_as_a_rectified_flow():
    """An EDM teacher wrapped as a flow, as the authors' code does."""
    grid = EDM(0.02, 20.0).times(8)
    flow_grid = grid / (1 + grid)
    edm = jump_costs(ring(schedule=EDM(0.02, 20.0)), noise(5, dtype=torch.float64), grid)
    start = noise(5, dtype=torch.float64) * 20 / 21  # the same states
    states, slopes = [start], []
    teacher = ring()
    for t, s in itertools.pairwise(flow_grid.tolist()):
        slopes.append(teacher.predict(states[-1], t, target="flow"))
        states.append(states[-1] + (s - t) * slopes[-1])
    flow = jump_cost_matrix(torch.stack(states), torch.stack(slopes), flow_grid, Flow())
    above = torch.isfinite(flow)
    torch.testing.assert_close(edm.values[above], flow[above], rtol=1e-4, atol=1e-9)


# ---- shortest paths ------------------------------------------------------------------------------------------------------


def test_paths_equal_brute_force():
    costs = torch.rand(11, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    best, paths = bellman_paths(costs, 5)
    for k in range(1, 6):
        every = {
            inner: sum(float(costs[a, b]) for a, b in itertools.pairwise((0, *inner, 10)))
            for inner in itertools.combinations(range(1, 10), k - 1)
        }
        inner = min(every, key=every.__getitem__)
        assert best[k - 1].item() == pytest.approx(every[inner], abs=1e-12)
        assert paths[k - 1].tolist() == [0, *inner, 10]


def test_all_anchors_cost_nothing_and_more_steps_never_cost_more_on_a_flow():
    costs = jump_costs(ring(), noise(40), 20)
    whole = costs.schedule(20)
    assert whole.predicted_cost == 0 and whole.indices.tolist() == list(range(21))
    assert torch.equal(whole.times, costs.anchors)
    least = costs.least(20)
    assert bool((least[1:] <= least[:-1] + 1e-12).all())
    for k in (1, 3, 7):
        assert costs.schedule(k).predicted_cost == pytest.approx(float(least[k - 1]))
    assert costs.schedule(1).times.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("steps", [0, 21])
def test_impossible_numbers_of_steps_are_refused(steps):
    costs = jump_costs(ring(), noise(3), 20)
    with pytest.raises(InputError, match=r"1 to 20 steps \(got"):
        costs.schedule(steps)
    with pytest.raises(InputError, match=r"1 to 20 steps \(got"):
        bellman_schedule(ring(), steps, (2,), anchors=20, probes=3)


# ---- the schedule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_small_rings_gain_four_times_over_even_steps(seed):
    """Fresh noises, a reference that is four times finer than the anchors."""
    teacher = ring()
    schedule = bellman_schedule(teacher, 3, (2,), seed=seed)
    z = noise(600, seed=100 + seed)
    exact = Sampler(teacher, torch.linspace(1, 0, 401, dtype=torch.float64)).sample(z).x
    for k in (3, 4, 6):
        made = schedule.with_steps(k).sampler(teacher).sample(z)
        even = Sampler.ode(teacher, k).sample(z)
        assert made.nfe == even.nfe == k
        assert (even.x - exact).square().sum() >= 4 * (made.x - exact).square().sum()


def test_steps_are_short_where_the_flow_bends():
    sizes = bellman_schedule(ring(), 6, (2,)).step_sizes
    assert float(sizes.sum()) == pytest.approx(1)
    assert float(sizes[0]) > 3 * float(sizes[-2])  # a small ring is decided near the data


def test_a_matrix_is_used_again_and_cached(tmp_path):
    teacher = ring()
    first = bellman_schedule(teacher, 4, (2,), anchors=30, probes=10, cache=tmp_path)
    asked = teacher.evaluations
    again = bellman_schedule(teacher, 4, (2,), anchors=30, probes=10, cache=tmp_path)
    assert teacher.evaluations == asked and torch.equal(first.times, again.times)
    assert torch.equal(bellman_schedule(teacher, 4, cost_matrix=first.costs).indices, first.indices)
    assert teacher.evaluations == asked
    assert len(list(tmp_path.iterdir())) == 1
    for other in (
        {"seed": 1},
        {"guidance": 1.5},
        {"anchors": 29},
        {"probes": 9},
        {"conditions": torch.zeros(4).long()},
    ):
        bellman_schedule(teacher, 4, (2,), **{"anchors": 30, "probes": 10, "cache": tmp_path, **other})
    bellman_schedule(ring(0.4), 4, (2,), anchors=30, probes=10, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 7
    with pytest.raises(InputError, match="needs an attribute 'name' to be cached"):
        bellman_schedule(teacher, 4, (2,), anchors=8, cost=lambda a, b: (a - b).flatten(1).norm(dim=1), cache=tmp_path)


def test_costs_come_back_from_the_disk_and_damage_is_named(tmp_path):
    costs = jump_costs(ring(), noise(3), 5)
    costs.save(tmp_path / "a" / "costs.npz")
    back = JumpCosts.load(tmp_path / "a" / "costs.npz")
    assert torch.equal(back.values, costs.values) and torch.equal(back.anchors, costs.anchors) and back.probes == 3
    (tmp_path / "bad.npz").write_bytes(b"no")
    with pytest.raises(RunError, match=r"bad.npz does not hold costs"):
        JumpCosts.load(tmp_path / "bad.npz")


def test_random_state_is_left_alone():
    state = torch.get_rng_state()
    bellman_schedule(ring(), 2, (2,), anchors=5, probes=2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: bellman_schedule(ring(), 2), "needs shape="),
        (lambda: bellman_schedule(ring(), 2, (2,), probes=0), "at least one probe"),
        (lambda: bellman_schedule(ring(), 2, (2,), anchors=[0.0, 0.5, 1.0]), "times must be two or more that fall"),
        (lambda: jump_costs(ring(), noise(2), 4, cost=lambda a, b: (a - b).sum()), "one number per sample"),
        (
            lambda: JumpCosts(torch.linspace(1, 0, 3), torch.full((3, 3), -1.0), 1),
            "must be 0 or more, not NaN",
        ),
        (lambda: JumpCosts(torch.linspace(1, 0, 3), torch.zeros(2, 2), 1), r"is \(3, 3\), not \(2, 2\)"),
        (
            lambda: jump_costs(ring(), noise(2), 4).joined(jump_costs(ring(), noise(2), 5)),
            "different anchors cannot be joined",
        ),
        (lambda: jump_costs(ring(), noise(2) * torch.nan, 4), "trajectory of the teacher holds NaN"),
    ],
)
def test_errors_name_the_remedy(call, line):
    with pytest.raises(InputError, match=line):
        call()


def test_an_unknown_cost_is_refused():
    x = torch.zeros(3, 2, 2)
    with pytest.raises(UnknownNameError, match="unknown cost of a jump 'l3'"):
        jump_cost_matrix(x, x[:2], torch.linspace(1, 0, 3, dtype=torch.float64), Flow(), "l3")


# ---- diffusers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_times_come_out_of_the_diffusers_scheduler(shift):
    diffusers = pytest.importorskip("diffusers")
    schedule = bellman_schedule(ring(schedule=Flow(shift)), 4, (2,), anchors=40, probes=8)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(**to_diffusers(schedule, Flow(shift)))
    torch.testing.assert_close(scheduler.sigmas, schedule.times.float())
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    dynamic.set_timesteps(mu=0.8, **to_diffusers(schedule, Flow(shift), shift=math.exp(0.8)))
    torch.testing.assert_close(dynamic.sigmas, schedule.times.float())


def test_discrete_times_come_out_of_the_diffusers_scheduler():
    diffusers = pytest.importorskip("diffusers")
    noise_schedule = VPDiscrete()
    schedule = bellman_schedule(ring(schedule=noise_schedule), 4, (2,), anchors=40, probes=8)
    asked = to_diffusers(schedule, noise_schedule)
    assert asked["timesteps"][0] == 999 and all(isinstance(k, int) for k in asked["timesteps"])
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(**asked)
    torch.testing.assert_close(scheduler.sigmas, noise_schedule.nsr(schedule.times).float(), rtol=1e-3, atol=1e-4)


def test_edm_times_come_out_of_the_diffusers_scheduler():
    diffusers = pytest.importorskip("diffusers")
    schedule = bellman_schedule(ring(schedule=EDM()), 4, (2,), anchors=40, probes=8)
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(4, **to_diffusers(schedule, EDM()))
    torch.testing.assert_close(scheduler.sigmas, schedule.times.float(), rtol=1e-4, atol=1e-6)


def test_times_that_diffusers_cannot_take_are_refused():
    with pytest.raises(InputError, match="diffusers has no scheduler"):
        to_diffusers(torch.tensor([1.0, 0.5, 0.0]), VPCosine())
    with pytest.raises(InputError, match="end at clean data, these times at 0.1"):
        to_diffusers(torch.tensor([1.0, 0.5, 0.1]), Flow())
    with pytest.raises(InputError, match="two times fall on one of 1000 indices"):
        to_diffusers(torch.tensor([1.0, 0.5003, 0.5001, 0.0]), VPDiscrete())
