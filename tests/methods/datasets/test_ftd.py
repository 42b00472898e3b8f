"""FTD: flat experts, the average of the images, and the choice between them."""

from __future__ import annotations

import pytest
import torch

from limbeck.core.data import TensorData
from limbeck.core.engine import Engine, EngineConfig
from limbeck.methods.datasets import ftd
from limbeck.methods.datasets.ftd import FTD
from tests.helpers import resumed_equals_uninterrupted
from tests.methods.datasets.trajectory_cases import SMALL, Stepper, experts, network, real

torch.set_num_threads(1)


def make(**settings):
    return FTD(real(), network, experts=experts(), **{**SMALL, "check_networks": 1, **settings})


def test_the_average_is_the_recursion():
    method = make(ema=0.8)
    expected = method.images.detach().clone()
    stepper = Stepper(method.optimisers(20))
    for step in range(5):
        stepper.step = step
        method.update(None, stepper)
        method.follow_images()
        expected = 0.8 * expected + 0.2 * method.images.detach()
    torch.testing.assert_close(method.average, expected)
    assert not torch.allclose(method.average, method.images.detach())


def test_experts_are_flat_ones():
    config = make().expert_config()
    assert (config.rho, config.alpha, config.adaptive, config.momentum, config.weight_decay) == (0.5, 0.3, True, 0, 0)


@pytest.mark.parametrize(("better", "chosen"), [("images", False), ("average", True)])
def test_the_better_one_on_validation_data_is_kept(better, chosen, monkeypatch):
    method = make()
    method.average.add_(1)
    seen = []

    class Known:
        def __init__(self, dataset):
            self.which = (
                "average" if torch.allclose(dataset.inputs.mean(), method.average.mean(), atol=0.1) else "images"
            )

        def accuracies(self, inputs, labels):
            seen.append((len(inputs), self.which))
            return [0.9 if self.which == better else 0.5]

    monkeypatch.setattr(ftd, "train_networks", lambda dataset, *a, **k: Known(dataset))
    found = method.choose(TensorData(*real(12, 3)))
    assert [s[1] for s in seen] == ["images", "average"] and seen[0][0] == 12
    assert found[better] == 0.9 and bool(method.use_average) is chosen
    kept = method.product()[0]
    assert torch.equal(kept, method.average if chosen else method.images.detach())
    method.choose()  # without validation data: real training samples
    assert seen[-1][0] == 45


def test_without_an_average_nothing_is_compared(monkeypatch):
    method = make(ema=0.0)
    monkeypatch.setattr(ftd, "train_networks", lambda *a, **k: pytest.fail("compared"))
    assert method.choose() == {} and not method.use_average


def test_a_run_ends_with_a_choice():
    method = make(steps=4)
    Engine(None, EngineConfig(progress=False), seed=0).run(method, method.stages(None, TensorData(*real(12, 3))))
    assert method.average.shape == method.images.shape
    made = method.distilled()
    assert len(made) == 6 and made.recipe["lr"] > 0
    found = method.evaluate(TensorData(*real(12, 4)))
    assert found["average_chosen"] in (True, False)


def test_a_run_resumes_exactly(tmp_path):
    resumed_equals_uninterrupted(make, None, tmp_path)


def test_the_paper_preset_is_valid():
    config = FTD.Config.make("paper")
    assert (config.rho, config.alpha, config.ema) == (0.01, 0.3, 0.9995)
