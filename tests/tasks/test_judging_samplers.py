from __future__ import annotations

import base64
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.data import TensorData
from limbeck.core.errors import InputError
from limbeck.diffusion.conditions import Conditions
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.schedules import Flow
from limbeck.tasks.generation import GenerationTask, mixture_task
from limbeck.tasks.judging_samplers import (
    Ground,
    as_pixels,
    draw,
    exact_logits,
    judge_samplers,
    sample_pictures,
)

torch.set_num_threads(1)


class Shrunk(nn.Module):
    """Predicts the given point, plus a share of the noise, whatever it is asked."""

    def __init__(self, centre: Tensor, spread: float = 0.0) -> None:
        super().__init__()
        self.centre, self.spread = nn.Parameter(centre), spread

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.centre + self.spread * x


class Diverged(nn.Module):
    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return x * math.nan


def one_step(module: nn.Module) -> Sampler:
    return Sampler.one_step(Denoiser(module, Flow(), "x0", null_cond=torch.tensor(8)))


def ring_samplers() -> tuple[dict[str, Sampler], dict[str, Any]]:
    task = mixture_task("ring")
    law = task.exact_teacher(Flow())
    samplers = {
        "fine": Sampler.ode(law, 40),
        "coarse": Sampler.ode(law, 2),
        "collapsed": one_step(Shrunk(torch.tensor([1.0, 0.0]), 0.02)),
    }
    return samplers, {"shape": (2,), "conditions": task.conditions, "test": task.test, "on": task}


def test_the_exact_law_is_near_the_best_and_a_collapsed_sampler_is_found_out() -> None:
    samplers, ground = ring_samplers()
    fine, coarse, collapsed = judge_samplers(samplers, **ground, fine=samplers["fine"], count=400)
    assert [r["who"] for r in (fine, coarse, collapsed)] == ["fine", "coarse", "collapsed"]
    assert fine["modes"] == 8 and fine["near_modes"] > 0.95 and fine["condition_agreement"] > 0.98
    assert fine["frechet_pixels"] < 0.01 and fine["coverage"] > 0.5 and fine["classes_covered"] > 7.8
    assert fine["paired_mse"] == 0 < coarse["paired_mse"]
    assert collapsed["modes"] == 1 and collapsed["near_modes"] == 1 and collapsed["coverage"] < 0.2
    assert collapsed["spread_ratio"] < 0.1 and collapsed["frechet_pixels"] > 1
    assert collapsed["condition_agreement"] == pytest.approx(1 / 8, abs=0.05)
    assert collapsed["classes_covered"] == pytest.approx(1, abs=0.01)
    assert fine["mmd"] < 0.01 < collapsed["mmd"] and fine["sliced_wasserstein"] < collapsed["sliced_wasserstein"]
    assert (fine["nfe"], coarse["nfe"], collapsed["nfe"]) == (40, 2, 1)
    assert fine["seconds_per_sample"] > collapsed["seconds_per_sample"] > 0
    assert collapsed["parameters"] == 2


def test_guidance_counts_two_evaluations() -> None:
    samplers, ground = ring_samplers()
    (row,) = judge_samplers({"guided": samplers["coarse"].replace(guidance=2.0)}, **ground, count=20)
    assert row["nfe"] == 4 and "paired_mse" not in row


def test_draws_have_equal_noise_and_conditions_in_turn() -> None:
    samplers, _ = ring_samplers()
    same = {"a": samplers["coarse"], "b": samplers["coarse"]}
    drawn = draw(same, (2,), 23, torch.tensor([0, 3, 5]), batch_size=10)
    assert torch.equal(drawn.samples["a"], drawn.samples["b"]) and drawn.samples["a"].shape == (23, 2)
    assert drawn.cond.tolist() == [0, 3, 5] * 7 + [0, 3]
    assert torch.equal(draw(same, (2,), 23, torch.tensor([0, 3, 5]), batch_size=10).samples["a"], drawn.samples["a"])
    assert not torch.equal(draw(same, (2,), 23, None, seed=1, batch_size=10).samples["a"], drawn.samples["a"])
    noisy = Sampler(samplers["coarse"].denoiser, torch.tensor([1.0, 0.5, 0.0]), "renoise")
    both = draw({"a": noisy, "b": noisy}, (2,), 10)
    assert torch.equal(both.samples["a"], both.samples["b"])  # added noise too


def test_a_sampler_that_gives_nan_has_no_quality_and_stops_nobody() -> None:
    samplers, ground = ring_samplers()
    rows = judge_samplers({"broken": one_step(Diverged()), "coarse": samplers["coarse"]}, **ground, count=50)
    assert rows[0].keys() == rows[1].keys()
    assert math.isnan(rows[0]["frechet_pixels"]) and math.isnan(rows[0]["condition_agreement"])
    assert rows[0]["nfe"] == 1 and math.isfinite(rows[1]["frechet_pixels"])


class Judge(nn.Module):
    """Tells bright images from dark ones."""

    def features(self, x: Tensor) -> Tensor:
        return torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3))], 1)

    def forward(self, x: Tensor) -> Tensor:
        bright = 20 * self.features(x)[:, :1]
        return torch.cat([-bright, bright], 1)


def test_images_are_judged_in_pixels_and_in_the_classifiers_features() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    real = 0.2 * torch.randn(60, 1, 4, 4, generator=generator) + (labels * 1.2 - 0.6).view(-1, 1, 1, 1)
    data = TensorData(real, labels)
    task = GenerationTask("shades", data, data, data, 2, (1, 4, 4), ["dark", "bright"], 0.6)
    task._classifier["it"] = Judge()
    task.images = task  # type: ignore[assignment]  # has a classifier
    given: dict[str, Any] = {"shape": (1, 4, 4), "conditions": Conditions(labels), "on": task}
    bright = one_step(Shrunk(torch.full((1, 4, 4), 0.6), 0.2))
    (row,) = judge_samplers({"bright": bright}, **given, test=data, count=60)
    assert row["condition_agreement"] == 0.5 and row["classes_covered"] == pytest.approx(1, abs=1e-3)
    assert row["frechet_features"] > 0.3 and "modes" not in row and "mmd" not in row
    (sheet,) = sample_pictures({"bright": bright}, **given, images=4)
    assert base64.b64decode(sheet["png"]).startswith(b"\x89PNG") and "noise and condition" in sheet["caption"]
    flat = {"x": one_step(Shrunk(torch.zeros(16)))}
    assert sample_pictures(flat, shape=(16,)) == []
    (sheet,) = sample_pictures(flat, shape=(16,), decode=lambda x: x.view(-1, 1, 4, 4))
    assert "same noise in" in sheet["caption"]


def test_classes_are_asked_for_as_the_held_out_data_has_them() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    test = TensorData(torch.randn(4, 2), labels)
    asked = Ground.of((2,), Conditions(torch.tensor([0, 1, 2])), test).cond
    assert isinstance(asked, torch.Tensor) and torch.equal(asked, labels)
    embedded = Conditions(torch.randn(5, 3))
    assert Ground.of((2,), embedded, test).cond is embedded.values
    assert Ground.of((2,), Conditions(None, 5), test).cond is None


def test_without_any_data_only_costs_and_pairs_remain() -> None:
    sampler = one_step(Shrunk(torch.zeros(3), 0.5))
    (row,) = judge_samplers({"s": sampler}, shape=(3,), fine=sampler, count=10)
    assert row.keys() == {"who", "paired_mse", "nfe", "seconds_per_sample", "parameters"} and row["paired_mse"] == 0
    with pytest.raises(InputError, match="at least 10 samples"):
        judge_samplers({"s": sampler}, shape=(3,), count=9)
    with pytest.raises(InputError, match="no sampler to judge"):
        judge_samplers({}, shape=(3,))


def test_exact_logits_are_bayes_and_pixels_are_clamped() -> None:
    law = mixture_task("classes-2d").exact
    assert law is not None
    x, labels = law.sample(400, torch.Generator().manual_seed(0))
    logits = exact_logits(law, x)
    own = torch.stack([law.log_prob(x.double(), 1e-6, torch.full((400,), c)) for c in range(6)], 1)
    torch.testing.assert_close(torch.softmax(logits, 1), torch.softmax(own, 1), atol=1e-4, rtol=0)
    assert labels is not None and (logits.argmax(1) == labels).double().mean() > 0.7
    assert as_pixels(torch.tensor([-3.0, -1, 0, 1, 2, math.nan])).tolist() == [0, 0, 128, 255, 255, 0]
