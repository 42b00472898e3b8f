from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from limbeck.blocks.ema import EMA
from limbeck.core.errors import InputError


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def step(model: nn.Module, seed: int) -> None:
    """Moves weights and BatchNorm statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    model.train()(torch.randn(5, 3, generator=generator))


def test_weights_follow_the_recursion(model: nn.Sequential) -> None:
    ema = EMA(model, decay=0.9)
    expected = [p.detach().clone() for p in model.parameters()]
    storages = [p.data_ptr() for p in ema.module.parameters()]
    for seed in range(5):
        step(model, seed)
        ema.update(model)
        expected = [0.9 * e + 0.1 * p.detach() for e, p in zip(expected, model.parameters(), strict=True)]
    for found, right in zip(ema.module.parameters(), expected, strict=True):
        torch.testing.assert_close(found.data, right)
    assert [p.data_ptr() for p in ema.module.parameters()] == storages
    assert ema.updates == 5


def test_warmup(model: nn.Sequential) -> None:
    ema = EMA(model, decay=0.15, warmup=True)
    value = model[0].bias.detach().clone()
    for t in range(3):
        step(model, t)
        ema.update(model)
        decay = min(0.15, (1 + t) / (10 + t))  # 0.1, then 0.15
        value = decay * value + (1 - decay) * model[0].bias.detach()
        torch.testing.assert_close(ema.module[0].bias.data, value)


def test_decay_limits_and_override(model: nn.Sequential) -> None:
    fixed, copied, steered = EMA(model, decay=1.0), EMA(model, decay=0.0), EMA(model, decay=1.0, warmup=True)
    start = copy.deepcopy(model)
    step(model, 0)
    fixed.update(model)
    copied.update(model)
    steered.update(model, decay=0.5)
    assert torch.equal(fixed.module[0].weight, start[0].weight)
    torch.testing.assert_close(copied.module[0].weight.data, model[0].weight.data)
    torch.testing.assert_close(steered.module[0].weight.data, (start[0].weight + model[0].weight).data / 2)


def test_buffers(model: nn.Sequential) -> None:
    copies, averages = EMA(model, 0.9, buffers="copy"), EMA(model, 0.9, buffers="average")
    start = model[1].running_mean.clone()
    step(model, 0)
    copies.update(model)
    averages.update(model)
    assert torch.equal(copies.module[1].running_mean, model[1].running_mean)
    torch.testing.assert_close(averages.module[1].running_mean, 0.9 * start + 0.1 * model[1].running_mean)
    assert copies.module[1].num_batches_tracked == averages.module[1].num_batches_tracked == 1


def test_frozen_and_always_in_eval_mode(model: nn.Sequential) -> None:
    ema = EMA(model.train())
    outer = nn.ModuleList([ema]).train()
    assert not any(m.training for m in outer[0].modules())
    assert not any(p.requires_grad for p in ema.parameters())
    assert all(p.requires_grad for p in model.parameters()) and model.training
    x = torch.randn(5, 3, requires_grad=True)
    torch.testing.assert_close(ema(x), copy.deepcopy(model).eval()(x))
    ema(x).sum().backward()
    assert x.grad is not None


def test_swap_into(model: nn.Sequential) -> None:
    ema = EMA(model, 0.9)
    step(model, 0)
    ema.update(model)
    before = copy.deepcopy(model.state_dict())
    averaged = copy.deepcopy(ema.module.state_dict())

    def evaluate() -> None:
        with ema.swap_into(model) as swapped:
            assert swapped is model
            assert all(torch.equal(v, averaged[k]) for k, v in model.state_dict().items())
            model.train()(torch.randn(4, 3))  # moves the BatchNorm statistics
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        evaluate()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, averaged[k]) for k, v in ema.module.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_state_dict_round_trip(model: nn.Sequential) -> None:
    ema = EMA(model, 0.99, warmup=True)
    step(model, 0)
    ema.update(model)
    other = EMA(model, 0.99, warmup=True)
    other.load_state_dict(ema.state_dict())
    step(model, 1)
    for average in (ema, other):
        average.update(model)
    assert other.updates == 2
    assert all(torch.equal(a, b) for a, b in zip(ema.module.parameters(), other.module.parameters(), strict=True))


def test_precise_average_of_a_low_precision_model(model: nn.Sequential) -> None:
    model = model.bfloat16()
    ema = EMA(model, 0.999).float()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        ema.module[0].weight.fill_(0.5)
    ema.update(model)
    torch.testing.assert_close(ema.module[0].weight.data, torch.full((4, 3), 0.5005))  # bfloat16 would stay at 0.5


def test_compiled_model_is_looked_through(model: nn.Sequential) -> None:
    compiled = torch.compile(model, backend="eager")
    ema = EMA(compiled, 0.0)
    step(model, 0)
    ema.update(compiled)
    torch.testing.assert_close(ema.module[0].weight.data, model[0].weight.data)


def test_bad_input(model: nn.Sequential) -> None:
    with pytest.raises(InputError, match=r"decay must be in \[0, 1\]"):
        EMA(model, decay=1.1)
    with pytest.raises(InputError, match="buffers must be"):
        EMA(model, buffers="keep")  # type: ignore[arg-type]
    ema = EMA(model)
    with pytest.raises(InputError, match=r"'0.weight' differs"):
        ema.update(nn.Sequential(nn.Linear(3, 5)))
    with pytest.raises(InputError, match="differs"), ema.swap_into(model[:1]):
        pass
    with pytest.raises(InputError, match="decay"):
        ema.update(model, decay=-0.1)
    assert ema.updates == 0
