from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from limbeck.core.checkpoint import load_checkpoint, save_checkpoint
from limbeck.core.errors import InputError
from limbeck.rendering.cameras import orbit
from limbeck.rendering.densification import Densification, DensificationRule
from limbeck.rendering.gaussians import Gaussians
from limbeck.rendering.splatting import splat
from limbeck.rendering.views import view_of

torch.set_num_threads(1)
VIEWS = orbit([0.0, 90.0, 200.0], 20.0, 3.0, 45.0, 24, 20)


def scene(count: int = 8, opacity: float = 0.5) -> Gaussians:
    torch.manual_seed(1)
    made = Gaussians.from_points(0.5 * torch.randn(count, 3), torch.rand(count, 3), sh_degree=1, opacity=opacity)
    made.log_scales.data.fill_(math.log(0.05))
    return made


def adam(made: Gaussians) -> torch.optim.Adam:
    optimizer = torch.optim.Adam(list(made.param_groups()))
    sum(p.square().sum() + p.sum() for p in made.parameters()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def pulled(made: Gaussians, which: list[int], rule: DensificationRule, extent: float = 1.0) -> Densification:
    work = Densification(made, extent, rule)
    work.seen += 4
    work.gradient[which] = 4 * 1.01 * rule.gradient
    return work


def test_what_is_recorded():
    made = scene()
    work = Densification(made, 1.0)
    view = view_of(VIEWS, 0)
    made.means.data[3] = torch.tensor([40.0, 0, 0])  # behind the camera
    seen = splat(made, view)
    (seen.rgb**2).sum().backward()
    work.record(seen, view)
    grad = seen.means2d.grad
    expected = torch.stack([grad[:, 0] * 12, grad[:, 1] * 10], 1).norm(dim=1) * (seen.radii > 0)
    torch.testing.assert_close(work.gradient, expected)
    assert work.seen[3] == 0 and work.seen.sum() == (seen.radii > 0).sum() > 3


def test_small_ones_are_cloned_large_ones_split_and_running_means_follow():
    made = scene()
    optimizer = adam(made)
    made.log_scales.data[2] = math.log(0.3)
    before = {name: value.detach().clone() for name, value in made.named_parameters()}
    moments = optimizer.state[made.means]["exp_avg"].clone()
    work = pulled(made, [2, 5], DensificationRule(small=0.1))
    assert work.densify(optimizer) == (1, 1, 0)
    kept = [0, 1, 3, 4, 5, 6, 7]
    assert len(made) == 7 + 1 + 2
    for name, value in made.named_parameters():
        assert torch.equal(value[:7], before[name][kept]), name
        assert torch.equal(value[7], before[name][5]), name
    torch.testing.assert_close(made.log_scales[8:], (before["log_scales"][2] - math.log(1.6)).expand(2, 3))
    assert float((made.means[8] - made.means[9]).detach().abs().max()) > 0
    assert torch.equal(optimizer.state[made.means]["exp_avg"][:7], moments[kept])
    assert not bool(optimizer.state[made.means]["exp_avg"][7:].any())
    assert all(group["params"][0] is getattr(made, group["name"]) for group in optimizer.param_groups)
    assert len(work.seen) == 10 and not bool(work.gradient.any())


def test_parts_of_a_split_are_drawn_from_the_gaussian():
    made = scene(1)
    made.log_scales.data[0] = torch.tensor([-1.0, -2.0, -3.0])
    made.quats.data[0] = torch.tensor([0.3, -0.5, 0.2, 0.7])
    expected, centre = made.covariances()[0].detach(), made.means[0].detach().clone()
    work = pulled(made, [0], DensificationRule(small=0.001, parts=20_000))
    assert work.densify() == (0, 1, 0)
    away = (made.means - centre).detach()
    torch.testing.assert_close(away.mT @ away / len(away), expected, rtol=0.05, atol=2e-3)


def test_clear_ones_go_and_huge_ones_only_after_a_reset():
    made = scene()
    made.opacity_logits.data[[0, 4]] = -6.0
    made.log_scales.data[6, 1] = math.log(0.4)
    rule = DensificationRule(min_opacity=0.005, large=0.3)
    assert Densification(made, 1.0, rule).densify().pruned == 2
    assert len(made) == 6
    optimizer = adam(made)
    work = Densification(made, 1.0, rule)
    work.reset(optimizer)
    torch.testing.assert_close(made.opacities, torch.full((6,), 0.01))
    assert not bool(optimizer.state[made.opacity_logits]["exp_avg"].any())
    assert bool(optimizer.state[made.means]["exp_avg"].any())
    assert work.densify(optimizer).pruned == 1 and len(made) == 5
    made.opacity_logits.data.fill_(-9.0)
    assert work.densify(optimizer).pruned == 0  # a scene is never emptied


def test_the_schedule():
    made = scene()
    work = Densification(made, 1.0, DensificationRule(every=10, begin=20, end=50, reset_every=25))
    found = [n for n in range(1, 80) if work.step(n) is not None]
    assert found == [30, 40, 50] and work.resets == 2


def test_no_more_than_the_most():
    made = scene()
    assert pulled(made, list(range(8)), DensificationRule(small=1.0, most=11)).densify() == (3, 0, 0)


def run(steps: range, made: Gaussians, work: Densification, optimizer: torch.optim.Adam) -> None:
    for number in steps:
        view = view_of(VIEWS, int(torch.randint(3, ())))
        optimizer.zero_grad()
        seen = splat(made, view, 1.0)
        (seen.rgb - 0.3).abs().mean().backward()
        work.record(seen, view)
        optimizer.step()
        work.step(number, optimizer)


def parts() -> tuple[Gaussians, Densification, torch.optim.Adam]:
    made = scene()
    rule = DensificationRule(every=4, begin=3, end=100, gradient=1e-4, reset_every=9, small=0.03)
    return made, Densification(made, 1.0, rule), torch.optim.Adam(list(made.param_groups()))


def test_training_goes_on_exactly_from_a_checkpoint(tmp_path: Path):
    made, work, optimizer = parts()
    torch.manual_seed(2)
    run(range(1, 11), made, work, optimizer)
    assert len(made) > 8
    state = {"scene": made.state_dict(), "work": work.state_dict(), "adam": optimizer.state_dict()}
    save_checkpoint(tmp_path / "c.pt", {**state, "random": torch.get_rng_state()})
    run(range(11, 20), made, work, optimizer)
    again, second, other = parts()
    stored = load_checkpoint(tmp_path / "c.pt")
    again.load_state_dict(stored["scene"])
    other = torch.optim.Adam(list(again.param_groups()))
    other.load_state_dict(stored["adam"])
    second.load_state_dict(stored["work"])
    torch.set_rng_state(stored["random"])
    run(range(11, 20), again, second, other)
    assert len(again) == len(made) > 10
    for (name, a), b in zip(made.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_bad_input_is_named():
    with pytest.raises(InputError, match="extent is above 0"):
        Densification(scene(), 0.0)
    with pytest.raises(InputError, match="every reset would remove everything"):
        DensificationRule(min_opacity=0.5)
    with pytest.raises(InputError, match="2 or more smaller parts"):
        DensificationRule(parts=1)
