from __future__ import annotations

import torch

from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.seeding import seed_everything
from limbeck.diffusion.oracles import gaussian_mixture
from limbeck.diffusion.schedules import VPCosine
from limbeck.methods.fields.sds import SDS
from limbeck.rendering.particles import SampleParticles
from tests.methods.fields.worlds import prior, scenes

torch.set_num_threads(1)


def test_the_drawn_noise_takes_the_place_of_the_renders_own_score():
    method = SDS(prior(), scenes(), batch_size=2)
    seen = method.look(0)
    assert method.own_eps(seen) is seen.noise and method.fake is None


def test_points_collapse_onto_the_mode_of_a_gaussian():
    # the expected pull is omega alpha sigma (x - mean)/(alpha^2 s^2 + sigma^2): it vanishes at the mean alone
    law = gaussian_mixture(torch.tensor([[0.7, -0.4]]), 0.5, schedule=VPCosine())
    torch.manual_seed(0)
    method = SDS(law, SampleParticles(torch.randn(64, 2)), batch_size=64, steps=300, lr=0.03, guidance=1.0)
    seed_everything(1)
    Engine(None, EngineConfig(progress=False), seed=1).run(method, method.stages())
    found = method.particles.samples.detach()
    assert torch.allclose(found.mean(0), torch.tensor([0.7, -0.4]), atol=0.1)
    assert found.std(0).max() < 0.3  # the law itself has 0.5


def test_the_published_preset_is_valid():
    config = SDS.Config.make(**SDS.Config.preset_values("paper"))
    assert config.guidance == 101.0 and config.t_high_late is None
