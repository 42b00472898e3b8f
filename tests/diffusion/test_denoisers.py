from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from limbeck.core.errors import InputError, UnknownNameError
from limbeck.diffusion.denoisers import Denoiser, params_frozen
from limbeck.diffusion.predictions import PREDICTIONS, convert
from limbeck.diffusion.schedules import EDM, Flow, Schedule, Trig, VPDiscrete
from limbeck.networks.diffusion_mlp import DiffusionMLP

torch.set_num_threads(1)


class Net(nn.Module):
    """Linear in x, a number per class added; counts its forward passes and notes what it was told."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line, self.classes = nn.Linear(3, 3), nn.Embedding(5, 3)
        self.calls: list[tuple[int, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        self.calls.append((len(x), t))
        hidden = self.line(x) + 0.001 * t[:, None].to(x.dtype)
        return hidden if cond is None else hidden + self.classes(cond)


class Short(nn.Module):
    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return x[:, :2]


def denoiser(prediction: str = "flow", schedule: Schedule | None = None, **options) -> Denoiser:
    return Denoiser(Net(), schedule or Flow(), prediction, null_cond=torch.tensor(4), **options)


X = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
T = torch.linspace(0.1, 0.9, 6)
COND = torch.tensor([0, 1, 2, 3, 0, 1])


@pytest.mark.parametrize("schedule", [Flow(), VPDiscrete(), Trig(), EDM()], ids=repr)
def test_it_can_be_asked_for_anything(schedule: Schedule):
    for own in PREDICTIONS:
        if own == "v" and not schedule.variance_preserving:
            continue
        made = denoiser(own, schedule)
        raw = made.module(X, schedule.to_model_time(T), COND)
        for target in PREDICTIONS:
            if target == "v" and not schedule.variance_preserving:
                continue
            expected = convert(raw, own, target, X, T, schedule)
            torch.testing.assert_close(made.predict(X, T, COND, target), expected)
        torch.testing.assert_close(made(X, T, COND), made.predict(X, T, COND, "x0"))


def test_the_network_is_told_its_own_time():
    made = denoiser("eps", VPDiscrete())
    made.predict(X, torch.full((6,), 1.0))
    assert made.module.calls[-1][1].tolist() == pytest.approx([999.0] * 6)
    made.predict(X, 0.5)  # a number serves all samples
    assert made.module.calls[-1][1].tolist() == pytest.approx([499.0] * 6)


@pytest.mark.parametrize("sigma", [0.002, 0.5, 80.0])
def test_edm_preconditioning_by_numpy(sigma: float):
    data = 0.7
    made = Denoiser(Net(), EDM(), precond="edm", sigma_data=data)
    x = X.double().numpy() * sigma
    inner = made.module(torch.from_numpy(x / np.sqrt(sigma**2 + data**2)).float(), torch.full((6,), np.log(sigma) / 4))
    skip, out = data**2 / (sigma**2 + data**2), sigma * data / np.sqrt(sigma**2 + data**2)
    expected = skip * x + out * inner.detach().double().numpy()
    found = made.predict(torch.from_numpy(x).float(), sigma).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert made.prediction == "x0"
    half = made.bfloat16().predict(torch.from_numpy(x).bfloat16(), sigma)
    assert half.dtype == torch.bfloat16
    np.testing.assert_allclose(
        half.detach().float().numpy(), expected, rtol=0.05, atol=0.05 * max(1, abs(expected).max())
    )


def test_guidance_one_is_the_conditional_model():
    made = denoiser()
    torch.testing.assert_close(made.predict(X, T, COND, guidance=1.0), made.predict(X, T, COND), rtol=0, atol=0)
    assert made.evaluations == 2 and [n for n, _ in made.module.calls] == [6, 6]
    ones = torch.ones(6)
    made.predict(X, T, COND, guidance=ones)
    assert made.evaluations == 3


@pytest.mark.parametrize("target", ["x0", "eps", "flow", "score"])
@pytest.mark.parametrize("split", [False, True])
def test_guidance_goes_from_the_null_condition_to_the_condition(target: str, split: bool):
    made = denoiser(split_guidance=split)
    null = torch.full((6,), 4)
    with_cond, without = made.predict(X, T, COND, target), made.predict(X, T, null, target)
    weight = torch.tensor([0.0, 0.5, 1.0, 2.0, 5.0, 7.5])
    for w in (0.0, 3.0, weight):
        by_hand = without + (w if isinstance(w, float) else w[:, None]) * (with_cond - without)
        torch.testing.assert_close(made.predict(X, T, COND, target, guidance=w), by_hand, rtol=1e-4, atol=1e-5)


def test_both_halves_go_through_in_one_pass_and_count_two():
    made = denoiser()
    made.predict(X, T, COND, guidance=2.0)
    assert [n for n, _ in made.module.calls] == [12] and made.evaluations == 2
    split = denoiser(split_guidance=True)
    split.predict(X, T, COND, guidance=2.0)
    assert [n for n, _ in split.module.calls] == [6, 6] and split.evaluations == 2


def test_a_negative_condition_takes_the_place_of_the_null_one():
    made = denoiser()
    negative = torch.full((6,), 3)
    a, b = made.predict(X, T, COND), made.predict(X, T, negative)
    torch.testing.assert_close(made.predict(X, T, COND, guidance=2.0, negative=negative), b + 2 * (a - b))
    with pytest.raises(InputError, match="negative"):
        made.predict(X, T, COND, guidance=2.0, negative=negative[:2])


def test_gradients_reach_inputs_and_parameters_and_can_be_kept_from_the_latter():
    made = denoiser("eps", Trig())
    x = X.clone().requires_grad_()
    made.predict(x, T, COND, "x0", 2.0).square().sum().backward()
    reference = x.grad.clone()
    assert all(p.grad is not None and bool(p.grad.any()) for p in made.parameters())
    made.zero_grad()
    made.module.classes.weight.requires_grad_(False)
    x.grad = None
    with params_frozen(made, made):
        loss = made.predict(x, T, COND, "x0", 2.0).square().sum()
    loss.backward()
    torch.testing.assert_close(x.grad, reference)
    assert all(p.grad is None for p in made.parameters())
    assert made.module.line.weight.requires_grad and not made.module.classes.weight.requires_grad
    with pytest.raises(ZeroDivisionError), params_frozen(made):
        _ = 1 / 0
    assert made.module.line.weight.requires_grad


def test_double_precision_stays():
    made = denoiser().double()
    found = made.predict(X.double(), 0.3, COND)
    assert found.dtype == torch.float64 and made.module.calls[-1][1].dtype == torch.float64
    assert float(made.module.calls[-1][1][0]) == 300.0  # not 0.3 in single precision times 1000
    assert made.bfloat16().predict(X.bfloat16(), T, COND, "eps", 2.0).dtype == torch.bfloat16


def test_other_networks_and_descriptions():
    made = denoiser("eps", VPDiscrete(), split_guidance=True)
    other = made.with_module(copy.deepcopy(made.module))
    assert other.module is not made.module and other.describe() == made.describe() and other.split_guidance
    assert made.describe()["null_class"] == 4 and made.conditional and not Denoiser(Net(), Flow(), "flow").conditional
    assert made.with_module(made.module, prediction="x0").prediction == "x0"
    torch.testing.assert_close(other.predict(X, T, COND), made.predict(X, T, COND))


def test_features_of_layers():
    network = DiffusionMLP((3,), width=8, blocks=2, num_classes=4)
    made = Denoiser(network, Flow(), "flow")
    first, last = made.features(X, T, COND, ["first", "blocks.1"])
    torch.testing.assert_close(first, network.first(X))
    assert last.shape == (6, 8) and made.evaluations == 1


def test_bad_input_is_named():
    with pytest.raises(InputError, match="variance|alpha"):
        Denoiser(Net(), Flow(), "v")
    with pytest.raises(UnknownNameError):
        Denoiser(Net(), Flow(), "noise")
    with pytest.raises(InputError, match="needs the schedule 'edm'"):
        Denoiser(Net(), Flow(), precond="edm")
    with pytest.raises(UnknownNameError, match="preconditioning"):
        Denoiser(Net(), EDM(), precond="vp")  # type: ignore[arg-type]
    made = denoiser()
    with pytest.raises(InputError, match="6 samples but 2 conditions"):
        made.predict(X, T, COND[:2])
    with pytest.raises(InputError, match="times"):
        made.predict(X, T[:3])
    with pytest.raises(UnknownNameError, match="prediction"):
        made.predict(X, T, target="noise")
    with pytest.raises(InputError, match="null_cond"):
        Denoiser(Net(), Flow(), "flow").predict(X, T, COND, guidance=2.0)
    with pytest.raises(InputError, match="gives shape"):
        Denoiser(Short(), Flow(), "flow").predict(X, T)
