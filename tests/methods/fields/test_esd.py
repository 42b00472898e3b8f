from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from limbeck.core.errors import InputError
from limbeck.methods.fields.esd import ESD
from limbeck.methods.fields.prolificdreamer import ProlificDreamer
from limbeck.methods.fields.sds import SDS
from tests.helpers import resumed_equals_uninterrupted
from tests.methods.fields.worlds import prior, scenes

torch.set_num_threads(1)


def stirred(method: Any) -> Any:
    """The learned network away from its start, the same for all methods."""
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in method.fake.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return method


def seen_by(method: Any) -> Any:
    torch.manual_seed(11)
    return method.look(0)


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 1.0])
def test_it_is_variational_score_distillation_with_guidance_on_the_camera(weight: float):
    ours = stirred(ESD(prior("network"), scenes(), batch_size=2, marginal="network", lam=1 - weight))
    theirs = stirred(ProlificDreamer(prior("network"), scenes(), batch_size=2, camera_guidance=weight))
    torch.testing.assert_close(ours.score_gradient(seen_by(ours)), theirs.score_gradient(seen_by(theirs)))
    assert ours.camera_weight() == weight


def test_without_entropy_it_is_variational_score_distillation_and_in_closed_form_sampling():
    ours = stirred(ESD(prior("network"), scenes(), batch_size=2, marginal="network", lam=0.0))
    theirs = stirred(ProlificDreamer(prior("network"), scenes(), batch_size=2))
    assert torch.equal(ours.score_gradient(seen_by(ours)), theirs.score_gradient(seen_by(theirs)))
    closed = ESD(prior(), scenes(), batch_size=2, lam=0.0)
    plain = SDS(prior(), scenes(), batch_size=2, guidance=closed.config.guidance)
    assert torch.equal(closed.score_gradient(seen_by(closed)), plain.score_gradient(seen_by(plain)))


def test_with_all_entropy_and_one_camera_the_camera_does_not_matter():
    method = stirred(ESD(prior("network"), scenes(), batch_size=2, marginal="network", lam=1.0))
    seen = seen_by(method)
    first = method.score_gradient(seen)
    assert seen.camera is not None
    seen.camera = torch.randn_like(seen.camera)
    assert torch.equal(first, method.score_gradient(seen))


def test_the_closed_form_is_that_of_a_kernel_density_over_the_renders():
    method = ESD(prior(), scenes(), batch_size=3, lam=0.4, kept_renders=5, kept_width=0.2)
    torch.manual_seed(1)
    method.refresh_renders()
    kept = method.fake.samples
    assert kept.shape == (5, 3, 8, 8) and kept.requires_grad is False
    assert len({tuple(row.flatten().tolist()) for row in kept}) == 5
    seen = method.look(0)
    a, s = method.schedule.alpha(seen.t), method.schedule.sigma(seen.t)
    variance = a**2 * 0.2**2 + s**2
    gaps = (seen.x_t.flatten(1)[:, None] - a[:, None, None] * kept.flatten(1)[None]).square().sum(2)
    shares = torch.softmax(-gaps / (2 * variance[:, None]), 1)
    mean = (shares @ kept.flatten(1)).view_as(seen.x_t)
    wanted = s.view(-1, 1, 1, 1) * (seen.x_t - a.view(-1, 1, 1, 1) * mean) / variance.view(-1, 1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(method.own_eps(seen), 0.4 * wanted + 0.6 * seen.noise, rtol=1e-3, atol=1e-3)


def test_the_score_of_all_views_pushes_a_view_away_from_the_others():
    # the prior is indifferent (wide), so what moves a view is the entropy alone: away from the mean of the renders near to it
    method = ESD(prior(), scenes(), batch_size=2, lam=1.0, kept_renders=2, kept_width=1.0)
    method.fake.refresh(torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)]))
    x, t = torch.full((1, 3, 8, 8), 0.9), torch.tensor([0.3])
    a = method.schedule.alpha(t)
    eps = method.fake.eps(a * x, t)
    # x lies between both: its own noise estimate points from the renders' mean to it, so subtracting eps in the bracket and stepping along
    # minus the bracket moves x along +eps: away from the mean
    assert (eps * (x - 0.5)).sum() > 0 or (eps * (x - 1.0)).sum() > 0


def test_renders_are_drawn_anew_every_few_steps(monkeypatch: pytest.MonkeyPatch):
    method = ESD(prior(), scenes(), batch_size=2, lam=1.0, kept_renders=4, refresh=3, steps=7)
    drawn: list[int] = []
    own = method.refresh_renders
    monkeypatch.setattr(method, "refresh_renders", lambda step=0: (drawn.append(step), own(step))[1])

    class Stepper:
        step = 0

        def minimise(self, losses: Any, *names: str) -> None:
            assert names == ("particles",)

    stepper = Stepper()
    for step in range(7):
        stepper.step = step
        method.update(None, stepper)
    assert drawn == [0, 3, 6]


@pytest.mark.parametrize("marginal", ["renders", "network"])
def test_it_resumes_exactly(marginal: str, tmp_path: Path):
    resumed_equals_uninterrupted(
        lambda: ESD(prior("network"), scenes(), batch_size=2, steps=22, marginal=marginal, kept_renders=4, rank=2),
        None,
        tmp_path,
    )


def test_mistakes_get_one_clear_line():
    with pytest.raises((InputError, ValidationError)):
        ESD.Config.make(lam=1.5)
    with pytest.raises(InputError, match="learns no network"):
        ESD(prior(), scenes(), buffer=4)
    config = ESD.Config.make(**ESD.Config.preset_values("paper"))
    assert config.lam == 0.5 and config.marginal == "network"
