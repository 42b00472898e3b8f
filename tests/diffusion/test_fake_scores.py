from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.blocks.camera_embedding import CameraEmbedding
from limbeck.core.errors import InputError
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.fake_scores import LearnedScore, SampleScore
from limbeck.diffusion.oracles import gaussian_mixture
from limbeck.diffusion.recent_samples import RecentSamples
from limbeck.diffusion.schedules import Flow, VPCosine
from limbeck.networks.diffusion_mlp import DiffusionMLP

torch.set_num_threads(1)


def network(prediction: str = "eps", schedule: VPCosine | Flow | None = None) -> Denoiser:
    torch.manual_seed(0)
    net = DiffusionMLP((3,), 16, 1, 2)
    nn.init.normal_(net.last.weight, std=0.3)
    return Denoiser(net, schedule or VPCosine(), prediction, null_cond=torch.tensor(2))


def drawn(n: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(n, 3, generator=g),
        0.1 + 0.8 * torch.rand(n, generator=g),
        torch.randn(n, 3, generator=g),
        torch.arange(n) % 2,
    )


def test_an_addition_to_the_prior_leaves_the_prior_alone():
    law = gaussian_mixture(torch.randn(4, 3), 0.2, labels=torch.tensor([0, 0, 1, 1]), schedule=VPCosine())
    fake = LearnedScore(network(), base=law)
    assert not any(p is q for p in fake.parameters() for q in law.parameters())
    x, t, noise, cond = drawn()
    wanted = fake.denoiser.predict(x, t, cond, "eps") + law.predict(x, t, cond, "eps")
    torch.testing.assert_close(fake.eps(x, t, cond), wanted)
    fake.loss(x, t, noise, cond).backward()
    assert fake.denoiser.module.last.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_loss_is_in_the_networks_own_space(prediction: str):
    fake = LearnedScore(network(prediction))
    x, t, noise, cond = drawn()
    a, s = VPCosine().alpha(t)[:, None], VPCosine().sigma(t)[:, None]
    x_t = a * x + s * noise
    wanted = {"eps": noise, "v": a * noise - s * x, "x0": x}[prediction]
    found = fake.denoiser.predict(x_t, t, cond, prediction)
    torch.testing.assert_close(fake.loss(x, t, noise, cond), (found - wanted).square().mean(), rtol=1e-4, atol=1e-5)


def test_samples_get_no_gradient():
    fake = LearnedScore(network())
    x, t, noise, cond = drawn()
    x.requires_grad_()
    fake.loss(x, t, noise, cond).backward()
    assert x.grad is None


def test_the_camera_matters_where_it_is_known():
    made = network()
    embedding = CameraEmbedding(made.module, "time")
    for parameter in embedding.parameters():
        nn.init.normal_(parameter, std=0.5)
    fake = LearnedScore(made, camera=embedding)
    x, t, _, cond = drawn()
    camera = torch.randn(5, 16)
    known = torch.tensor([True, False, True, False, True])
    blind, told = fake.eps(x, t, cond, None), fake.eps(x, t, cond, camera)
    some = fake.eps(x, t, cond, camera, known)
    torch.testing.assert_close(some, torch.where(known[:, None], told, blind))
    assert not torch.allclose(blind, told)


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="they must be one"):
        LearnedScore(network(), base=network("flow", Flow()))
    with pytest.raises(InputError, match="must predict noise"):
        LearnedScore(network("v"), base=network())
    with pytest.raises(InputError, match="a width above 0"):
        SampleScore(3, (2,), 0.0, VPCosine())


def test_the_score_of_samples_is_exact():
    score = SampleScore(4, (3,), 0.3, VPCosine())
    with pytest.raises(InputError, match="the samples are"):
        score.refresh(torch.zeros(3, 3))
    samples = torch.randn(4, 3)
    score.refresh(samples)
    x, t, _, _ = drawn()
    x.requires_grad_()
    a, s = VPCosine().alpha(t), VPCosine().sigma(t)
    variance = (a**2 * 0.09 + s**2)[:, None]
    density = torch.logsumexp(-(x[:, None] - a[:, None, None] * samples).square().sum(2) / (2 * variance), 1)
    (slope,) = torch.autograd.grad(density.sum(), x)
    torch.testing.assert_close(score.eps(x.detach(), t), -s[:, None] * slope, rtol=1e-3, atol=1e-4)


def test_recent_samples_go_round():
    ring = RecentSamples(4, (2,))
    for k in range(3):
        ring.add(torch.full((2, 2), float(k)), torch.full((2, 16), float(k)), torch.full((2,), k))
    assert int(ring.count) == 6 and sorted(ring.images[:, 0].tolist()) == [1.0, 1.0, 2.0, 2.0]
    torch.manual_seed(0)
    x, camera, classes = ring.draw(50)
    assert camera is not None and torch.equal(x[:, 0], camera[:, 0]) and torch.equal(x[:, 0].long(), classes)
    other = RecentSamples(4, (2,))
    other.load_state_dict(ring.state_dict())
    assert torch.equal(other.images, ring.images) and int(other.count) == 6
