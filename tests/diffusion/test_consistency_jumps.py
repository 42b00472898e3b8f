from __future__ import annotations

import pytest
import torch

from limbeck.core.errors import InputError
from limbeck.diffusion.consistency import SegmentSampler, jump
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.oracles import gaussian_mixture
from limbeck.diffusion.schedules import EDM, Flow, Schedule, Trig, VPDiscrete
from limbeck.diffusion.solvers import ode_solve
from limbeck.networks.diffusion_mlp import DiffusionMLP

torch.set_num_threads(1)

MEANS = torch.tensor([[-1.0, 0.5], [1.0, -0.5]])


@pytest.mark.parametrize("schedule", [Flow(), VPDiscrete(), EDM(), Trig()], ids=lambda s: s.name)
def test_a_jump_is_a_step_of_ddim(schedule: Schedule):
    law = gaussian_mixture(MEANS, 0.3, labels=torch.tensor([0, 1]), schedule=schedule)
    t, s = (schedule.t_from_nsr(torch.full((6,), n, dtype=torch.float64)) for n in (2.0, 0.4))
    x = torch.randn(6, 2, dtype=torch.float64)
    cond = torch.tensor([0, 1] * 3)
    torch.testing.assert_close(jump(law, x, t, t, cond), x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(jump(law, x, t, s * 0, cond), law.predict(x, t, cond), rtol=1e-9, atol=1e-9)
    grid = torch.stack([t[0], s[0]])
    for w in (1.0, 2.0):
        by_solver = ode_solve(law, x, grid, cond=cond, guidance=w).x
        torch.testing.assert_close(jump(law, x, t, s, cond, guidance=w), by_solver, rtol=1e-9, atol=1e-9)


def test_a_jump_has_a_gradient():
    network = DiffusionMLP((2,), width=8, blocks=1)
    torch.nn.init.normal_(network.last.weight)
    x = torch.randn(4, 2, requires_grad=True)
    jump(Denoiser(network, Flow(), "flow"), x, torch.full((4,), 0.8), torch.full((4,), 0.3)).square().sum().backward()
    assert x.grad is not None and network.first.weight.grad is not None


@pytest.mark.parametrize(("points", "segments"), [(50, 1), (50, 4), (50, 7), (8, 8), (10, 3)])
@pytest.mark.parametrize("ends", ["any", "boundary"])
def test_segments(points: int, segments: int, ends: str):
    sampler = SegmentSampler(points, segments, ends)
    n, e = sampler.draw(20000, torch.Generator().manual_seed(0))
    borders = sampler.borders()
    assert len(borders) == segments + 1 and int(borders[0]) == points and int(borders[-1]) == 0
    assert bool((borders[1:] < borders[:-1]).all())
    assert set(n.unique().tolist()) == set(range(1, points + 1))  # every start comes up
    assert bool((e >= 0).all()) and bool((e < n).all())
    # the border below n - 1, found by looking through them
    below = torch.stack([borders[borders <= k].max() for k in (n - 1)[:2000]])
    assert torch.equal(sampler.lower(n)[:2000], below)
    assert bool((e >= sampler.lower(n)).all())
    if ends == "boundary":
        assert torch.equal(e, sampler.lower(n))
    else:
        top = n == n.max()
        assert set(e[top].unique().tolist()) == set(range(int(sampler.lower(n[top])[0]), points))


def test_ends_are_uniform_in_their_segment():
    sampler = SegmentSampler(20, 2)
    n, e = sampler.draw(40000, torch.Generator().manual_seed(1))
    share = torch.bincount(e[n == 20], minlength=20)[10:20].double()
    torch.testing.assert_close(share / share.sum(), torch.full((10,), 0.1, dtype=torch.float64), rtol=0, atol=0.03)


def test_latent_consistency_always_jumps_to_clean_data():
    n, e = SegmentSampler(50, 1, "zero").draw(100)
    assert not bool(e.any()) and int(n.min()) >= 1


def test_draws_replay():
    sampler = SegmentSampler(50, 5)
    first, second = (sampler.draw(64, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_bad_input_is_named():
    for points, segments in ((10, 0), (10, 11)):
        with pytest.raises(InputError, match="segments must lie"):
            SegmentSampler(points, segments)
    with pytest.raises(InputError, match="ends must be"):
        SegmentSampler(10, 2, "random")
    with pytest.raises(InputError, match="segments=1"):
        SegmentSampler(10, 2, "zero")
