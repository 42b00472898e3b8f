from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.diffusion.conditions import Conditions
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.schedules import Flow, VPDiscrete
from limbeck.methods.samplers.swiftbrush import SwiftBrush
from limbeck.networks.diffusion_mlp import DiffusionMLP
from tests.helpers import resumed_equals_uninterrupted

torch.set_num_threads(1)


def teacher(schedule: Any = None, prediction: str = "eps") -> Denoiser:
    torch.manual_seed(0)
    network = DiffusionMLP((4,), width=16, blocks=1, num_classes=3, time_features=8)
    nn.init.normal_(network.last.weight, std=0.3)
    return Denoiser(network, schedule or VPDiscrete("scaled_linear"), prediction, null_cond=torch.tensor(3))


def labels(n: int = 30) -> Tensor:
    return torch.arange(n) % 3


def make(**settings: Any) -> SwiftBrush:
    torch.manual_seed(3)
    return SwiftBrush(teacher(), labels(), **{"rank": 2, "batch_size": 6, "steps": 25, **settings})


def test_the_student_turns_noise_at_the_last_index_into_a_sample() -> None:
    method = make()
    z, cond = torch.randn(6, 4), labels(6)
    bar = method.teacher.schedule.alphas_cumprod[-1]
    eps = method.student.module(z, torch.full((6,), 999.0), cond)
    torch.testing.assert_close(method.generate(cond, z), (z - (1 - bar) ** 0.5 * eps) / bar**0.5, rtol=1e-4, atol=1e-4)


def test_the_students_loss_is_the_papers() -> None:
    method = make(guidance=4.5)
    with torch.no_grad():
        for p in method.lora.parameters():  # type: ignore[union-attr]
            p.add_(0.1 * torch.randn_like(p))
    x, cond = method.generate(labels(6)).detach().requires_grad_(), labels(6)
    torch.manual_seed(7)
    method.generator_losses(x, cond).total.backward()
    torch.manual_seed(7)
    t, noise = method.generator_times(6), torch.randn(6, 4)
    index = (t * 1000).round().long() - 1
    assert index.min() >= 20 and index.max() < 980
    bar = torch.tensor(method.teacher.schedule.alphas_cumprod)[index].float()[:, None]
    x_t = bar.sqrt() * x.detach() + (1 - bar).sqrt() * noise
    null = torch.full((6,), 3)

    def guided(network: Any) -> Tensor:
        with torch.no_grad():
            without = network(x_t, index.float(), null)
            return without + 4.5 * (network(x_t, index.float(), cond) - without)

    real = guided(method.teacher.module)
    with method.adapted():
        fake = guided(method.teacher.module)
    expected = (1 - bar) * (real - fake)
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(x.grad, expected / x.numel(), rtol=1e-3, atol=1e-6)


def test_the_adapters_loss_is_the_papers() -> None:
    method = make(cond_dropout=0.0)
    x, cond = torch.randn(6, 4), labels(6)
    torch.manual_seed(4)
    found = method.fake_losses(x, cond)["fake"]
    torch.manual_seed(4)
    t, noise = method.fake_times(6), torch.randn(6, 4)
    index = (t * 1000).round().long() - 1
    bar = torch.tensor(method.teacher.schedule.alphas_cumprod)[index].float()[:, None]
    with method.adapted():
        eps = method.teacher.module(bar.sqrt() * x + (1 - bar).sqrt() * noise, index.float(), cond)
    torch.testing.assert_close(found, (bar * (eps - noise) ** 2).mean(), rtol=1e-4, atol=1e-6)


def test_other_teachers_keep_their_own_training_loss() -> None:
    method = SwiftBrush(teacher(Flow(), "flow"), labels(), rank=2)
    assert method.fake_objective() == ("flow", None)


def test_the_published_settings_name_the_attention_projections() -> None:
    config = SwiftBrush.Config.make("paper")
    assert (config.guidance, config.rank, config.lora_alpha) == (4.5, 64, 108.0)
    assert config.lora_targets == ("to_q", "to_v") and config.lr_fake == 1000 * config.lr


def test_resume_is_exact(tmp_path: Path) -> None:
    method = resumed_equals_uninterrupted(make, Conditions(labels()), tmp_path)
    fresh = make().training_state()["tensors"]
    moved = {k for k, v in method.training_state()["tensors"].items() if not torch.equal(v, fresh[k])}
    assert any("lora_B" in k for k in moved) and any(k.startswith("student.") for k in moved)
    assert any(k.startswith("ema.") for k in moved)


def test_resume_is_exact_with_a_copy_and_other_schedules(tmp_path: Path) -> None:
    def copied() -> SwiftBrush:
        torch.manual_seed(3)
        return SwiftBrush(
            teacher(Flow(), "flow"), labels(), fake="copy", fake_steps=2, schedule="cosine", batch_size=6, steps=25
        )

    resumed_equals_uninterrupted(copied, Conditions(labels()), tmp_path)
