"""Execution in 8-bit integers agrees with its simulation; what the engines lack is said in one line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from limbeck import networks
from limbeck.adapters.int8 import compare_int8, to_int8
from limbeck.core.errors import InputError, UnknownNameError

ENGINES = [e for e in ("x86", "fbgemm", "qnnpack") if e in torch.backends.quantized.supported_engines]
pytestmark = pytest.mark.skipif(not ENGINES, reason="this build of torch has no engine for integers")


def trained_like(name: str) -> tuple[nn.Module, Tensor]:
    """A network whose logits spread as a trained one's do."""
    torch.manual_seed(0)
    model = networks.build(name, in_shape=(1, 8, 8), num_classes=10)
    x = torch.randn(200, 1, 8, 8)
    model.train()
    for _ in range(3):
        model(x)  # batch statistics
    return model.eval(), x


@pytest.mark.parametrize("engine", ENGINES)
def test_a_convolutional_network_runs_statically(engine: str) -> None:
    model, x = trained_like("cnn-w8-s2")
    made = to_int8(model, x[:100], engine=engine)
    assert (made.kind, made.engine) == ("static", engine)
    assert any("Conv" in type(m).__name__ and "quantized" in type(m).__module__ for m in made.network.modules())
    found = compare_int8(model, made, x[100:], repeats=3)
    assert found["difference_simulated"] < 0.02
    assert found["agreement_simulated"] >= 0.97
    assert found["agreement_float"] >= 0.9
    assert found["latency_ratio"] > 0
    assert torch.equal(model(x), trained_like("cnn-w8-s2")[0](x))  # the original is left alone


def test_a_static_layer_equals_its_equation_in_numpy() -> None:
    """Inputs and outputs on a grid of bytes, weights on one of int8 for each output."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(20, 6)).eval(), torch.randn(64, 20)
    network: Any = to_int8(model, x, kind="static", engine=ENGINES[0]).network.network
    layer = next(m for m in network.modules() if "quantized.modules.linear" in type(m).__module__)
    weight = layer.weight()
    scales = weight.q_per_channel_scales().numpy()[:, None]
    integers = weight.int_repr().numpy()
    rounded = model[0].weight.detach().numpy() / scales
    assert np.abs(integers - rounded).max() <= 0.5 + 1e-4
    assert integers.min() < -100  # each output uses its range
    scale, zero = (float(b) for name, b in network.named_buffers() if "_input_" in name)
    inputs = np.clip(np.round(x.numpy() / scale) + zero, 0, 255) - zero
    out = inputs * scale @ (integers * scales).T + model[0].bias.detach().numpy()
    out = (np.clip(np.round(out / layer.scale) + layer.zero_point, 0, 255) - layer.zero_point) * layer.scale
    np.testing.assert_allclose(network(x).detach().numpy(), out, atol=1.01 * layer.scale)  # ties may round either way
    assert (np.abs(network(x).detach().numpy() - out) < 1e-5).mean() > 0.99


def test_the_simulation_computes_in_floats() -> None:
    model, x = trained_like("cnn-w8-s2")
    kinds = {type(m).__module__ for m in to_int8(model, x[:50]).simulated.modules()}
    assert not any(
        "quantized.modules" in kind or "quantized.dynamic" in kind for kind in kinds if "reference" not in kind
    )


def test_linear_layers_run_dynamically() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 10)).eval()
    x = torch.randn(100, 1, 8, 8)
    made = to_int8(model)
    assert made.kind == "dynamic"
    found = compare_int8(model, made, x, repeats=3)
    assert found["difference_simulated"] < 0.01
    assert found["agreement_float"] >= 0.9
    assert found["bytes"] < 0.35 * sum(p.numel() * 4 for p in model.parameters())


class Branching(nn.Module):
    """Cannot be traced: what it does depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else -self.linear(x)


def test_what_cannot_be_traced_falls_back_or_says_so() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 6)
    assert to_int8(Branching(), x).kind == "dynamic"
    with pytest.raises(InputError, match="Branching cannot run statically in integers"):
        to_int8(Branching(), x, kind="static")


def test_the_engine_set_by_others_stays() -> None:
    before = torch.backends.quantized.engine
    model, x = trained_like("cnn-w8-s2")
    to_int8(model, x[:10], engine=ENGINES[-1]).network(x[:2])
    assert torch.backends.quantized.engine == before


def test_bad_input_is_named() -> None:
    model, x = trained_like("mlp-16")
    with pytest.raises(InputError, match=r"engine has kernels for 8-bit weights, not for 4-bit ones"):
        to_int8(model, x, bits=4)
    with pytest.raises(UnknownNameError, match="engine"):
        to_int8(model, x, engine="tensorrt")
    with pytest.raises(InputError, match="needs calibration samples"):
        to_int8(model, kind="static")
    with pytest.raises(InputError, match="no layer that runs dynamically"):
        to_int8(nn.Sequential(nn.Conv2d(1, 2, 3)))
