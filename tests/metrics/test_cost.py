from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.core.errors import InputError
from limbeck.metrics.cost import count_bytes, count_flops, count_parameters, measure_latency


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 8)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        return {"logits": scale * self.linear(x)}


class Attention(nn.Module):
    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q)


class Restless(nn.Module):
    """Changes buffers (in place and by assignment) and draws random numbers even in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.last = x[0] + torch.randn(4)
        return self.linear(x)


def test_parameters_and_bytes():
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    model[0].requires_grad_(False)
    assert count_parameters(model) == (15 + 5) + 10 + 12
    assert count_parameters(model, trainable_only=True) == 10 + 12
    # float32 parameters, running mean and variance, one int64 counter
    assert count_bytes(model) == 4 * 42 + 4 * 10 + 8
    assert count_bytes(model.half()) == 2 * 42 + 2 * 10 + 8


def test_shared_parameters_count_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert count_parameters(model) == 16 + 4 + 4
    assert count_bytes(model) == 4 * 24


@pytest.mark.parametrize("batch", [1, 3])
def test_flops_are_two_per_multiply_add_and_per_sample(batch: int):
    assert count_flops(nn.Linear(4, 8), torch.randn(batch, 4)) == 2 * 4 * 8
    conv = nn.Conv2d(3, 8, 3, padding=1)
    assert count_flops(conv, torch.randn(batch, 3, 6, 6)) == 2 * (3 * 9) * 8 * 36
    assert count_flops(nn.ReLU(), torch.randn(batch, 4)) == 0


def test_flops_take_tuples_and_mappings():
    x = torch.randn(2, 4)
    for sample in ((x, 2.0), {"x": x, "scale": 2.0}, [x], x):
        assert count_flops(Named(), sample) == 2 * 4 * 8


def test_flops_see_into_fused_kernels():
    q = torch.randn(2, 3, 10, 8)  # batch, heads, tokens, width
    attention = 2 * 2 * 3 * 10 * 10 * 8
    assert count_flops(Attention(), q) == attention
    layer = nn.TransformerEncoderLayer(24, 3, 48, batch_first=True)
    projections = 2 * 10 * (4 * 24 * 24 + 2 * 24 * 48)
    assert count_flops(layer, torch.randn(2, 10, 24)) == projections + attention
    assert count_flops(nn.LSTM(6, 7, batch_first=True), torch.randn(2, 5, 6)) == 2 * 5 * 4 * 7 * (6 + 7)


def test_switches_are_put_back():
    assert torch.backends.mha.get_fastpath_enabled() and torch.backends.mkldnn.enabled
    with pytest.raises(RuntimeError):
        count_flops(nn.Linear(4, 8), torch.randn(2, 5))
    assert torch.backends.mha.get_fastpath_enabled() and torch.backends.mkldnn.enabled
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("measure", [count_flops, lambda m, x: measure_latency({"m": m}, x, 3, 1)])
def test_the_model_is_left_as_it_was(measure):
    model = nn.Sequential(Restless(), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    model[1].eval()
    flags = [m.training for m in model.modules()]
    owned = dict(model.named_buffers())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    measure(model, torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(owned[k] is v for k, v in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


class Clock(nn.Module):
    """Takes a known time and writes down when it was called."""

    def __init__(self, name: str, seconds: float, log: list[str]) -> None:
        super().__init__()
        self.name, self.seconds, self.log = name, seconds, log

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training and not torch.is_grad_enabled()
        self.log.append(self.name)
        time.sleep(self.seconds)
        return x


def test_latency_takes_turns_and_gives_ratios():
    log: list[str] = []
    models = {n: Clock(n, s, log) for n, s in (("fast", 0.002), ("slow", 0.02), ("other", 0.002))}
    result = measure_latency(models, torch.zeros(1), repeats=6, warmup=2)
    assert list(result) == ["fast", "slow", "other"]
    rounds = [log[i : i + 3] for i in range(0, len(log), 3)]
    assert len(rounds) == 8
    assert all(sorted(r) == ["fast", "other", "slow"] for r in rounds)
    assert [r[0] for r in rounds[:3]] == ["fast", "slow", "other"]
    assert result["fast"]["ratio"] == 1
    assert result["slow"]["median_seconds"] >= 0.02
    assert result["slow"]["ratio"] > 2
    assert result["slow"]["iqr_seconds"] >= 0


def test_warmup_is_thrown_away():
    class ColdStart(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls <= 3:
                time.sleep(0.2)
            return x

    result = measure_latency({"m": ColdStart()}, torch.zeros(1), repeats=2, warmup=3)
    assert result["m"]["median_seconds"] < 0.1


def test_bad_input():
    for sample in (3.0, (), torch.tensor(1.0), torch.zeros(0, 4)):
        with pytest.raises(InputError, match="batch axis"):
            count_flops(nn.Linear(4, 8), sample)
    with pytest.raises(InputError, match="no model"):
        measure_latency({}, torch.zeros(1))
    with pytest.raises(InputError, match="repeats=1"):
        measure_latency({"m": nn.Identity()}, torch.zeros(1), repeats=1)
