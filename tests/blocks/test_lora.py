from __future__ import annotations

import gc
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from limbeck.blocks.ema import EMA
from limbeck.blocks.lora import LoRA
from limbeck.core.errors import InputError
from limbeck.core.method import fingerprint

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(6, 4, 3, padding="same", groups=2, dilation=2, padding_mode="reflect")
        self.block = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))
        self.norm = nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.grouped(self.stem(x).relu())
        return self.norm(self.block(h.mean((2, 3))))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().double()


def inputs(n: int = 3) -> Tensor:
    return torch.randn(n, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def moved(lora: LoRA, seed: int = 1) -> LoRA:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lora.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p))
    return lora


def test_a_linear_layer_gets_the_scaled_low_rank_product() -> None:
    layer = nn.Linear(4, 3).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    plain = layer(x).detach()
    lora = LoRA(layer, rank=2, alpha=6.0)
    torch.testing.assert_close(layer(x), plain)  # B is zero
    a, b = moved(lora).adapters.root.lora_A.weight, lora.adapters.root.lora_B.weight
    assert a.shape == (2, 4) and b.shape == (3, 2) and lora.scale == 3.0
    torch.testing.assert_close(layer(input=x), plain + 3.0 * x @ a.T @ b.T)
    assert lora.paths == ("",) and lora.describe() == {"rank": 2, "alpha": 6.0, "targets": [""], "parameters": 14}


def test_merging_equals_running_and_gives_back_the_same_tree() -> None:
    model, x = net(), inputs()
    keys, plain = list(model.state_dict()), model(x).detach()
    lora = moved(LoRA(model, rank=2, alpha=1.0))
    assert lora.paths == ("stem", "grouped", "block.0", "block.2")
    assert list(lora.state_dict())[:2] == ["adapters.stem.lora_A.weight", "adapters.stem.lora_B.weight"]
    adapted = model(x).detach()
    assert (adapted - plain).abs().max() > 1e-3
    copy = lora.merged()
    torch.testing.assert_close(copy(x), adapted)
    assert list(copy.state_dict()) == keys and all(p.requires_grad for p in copy.parameters())
    torch.testing.assert_close(model(x), adapted)  # the original still runs adapters on its old weights
    torch.testing.assert_close(lora.merge()(x), adapted)
    assert list(model.state_dict()) == keys and not model.stem._forward_hooks


def test_two_adapters_merge_to_what_both_give() -> None:
    model, x = net(), inputs()
    first = moved(LoRA(model, rank=2), 1)
    second = moved(LoRA(model, rank=4, alpha=2.0, targets=["block"]), 2)
    assert second.paths == ("block.0", "block.2")
    both = model(x).detach()
    with first.disabled():
        assert not torch.allclose(model(x), both)
    second.merge()
    torch.testing.assert_close(model(x), both)
    first.merge()
    torch.testing.assert_close(model(x), both)


def test_the_switch_and_removing_give_the_plain_module_bit_for_bit() -> None:
    model, x = net(), inputs()
    plain, mark = model(x).detach(), fingerprint(model)
    lora = moved(LoRA(model, rank=2))
    assert fingerprint(model) == mark  # a frozen teacher is the same with adapters on it
    with pytest.raises(RuntimeError, match="inside"), lora.disabled() as bare:
        assert torch.equal(bare(x), plain) and not lora.enabled
        raise RuntimeError("inside")
    assert lora.enabled and not torch.equal(model(x), plain)
    lora.scale = 0.0
    assert torch.equal(model(x), plain)
    lora.remove()
    assert torch.equal(model(x), plain) and fingerprint(model) == mark
    assert all(p.requires_grad for p in model.parameters())


def test_gradients_reach_the_adapters_and_the_input_only() -> None:
    model, x = net(), inputs().requires_grad_()
    lora = moved(LoRA(model, rank=2))
    model(x).square().sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lora.parameters())
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_one_rank_is_recovered_by_training() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5).double(), torch.randn(64, 6, dtype=torch.float64)
    wanted = layer(x).detach() + (x @ torch.randn(6, 1, dtype=torch.float64)) @ torch.randn(1, 5, dtype=torch.float64)
    lora = LoRA(layer, rank=1)
    optimizer = torch.optim.Adam(lora.parameters(), 0.05)
    for _ in range(400):
        optimizer.zero_grad()
        (loss := (layer(x) - wanted).square().mean()).backward()
        optimizer.step()
    assert loss < 1e-6


def test_state_travels_between_equal_modules() -> None:
    first, second, x = net(), net(), inputs()
    lora = moved(LoRA(first, rank=2))
    other = LoRA(second, rank=2)
    other.load_state_dict(lora.state_dict())
    torch.testing.assert_close(second(x), first(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        LoRA(net(), rank=4).load_state_dict(lora.state_dict())


def test_copies_are_independent_and_an_average_runs() -> None:
    model, x = net(), inputs()
    lora = moved(LoRA(model, rank=2))
    before = model(x).detach()
    ema = EMA(lora, decay=0.5)
    copy = deepcopy(lora)
    moved(lora, 7)
    torch.testing.assert_close(copy(x), before)
    torch.testing.assert_close(copy.base(x), before)
    ema.update(lora)
    half = deepcopy(lora)
    with torch.no_grad():
        for mine, old in zip(half.parameters(), copy.parameters(), strict=True):
            mine.lerp_(old, 0.5)
    torch.testing.assert_close(ema(x), half(x))
    copy.remove()
    assert torch.equal(copy.base(x), net()(x)) and len(model.stem._forward_hooks) == 1


def test_adapters_that_nobody_holds_leave_the_module() -> None:
    model = net()
    lora = LoRA(model, rank=2)
    assert len(model.stem._forward_hooks) == 1
    del lora
    gc.collect()
    assert not model.stem._forward_hooks


def test_functional_calls_and_vmap_over_adapters() -> None:
    model, x = net(), inputs()
    lora = moved(LoRA(model, rank=2))
    doubled = {k: 2 * v for k, v in lora.named_parameters()}
    found = functional_call(lora, doubled, (x,))
    other = deepcopy(lora)
    other.load_state_dict(doubled)
    torch.testing.assert_close(found, other(x))
    params, _ = stack_module_state([lora, other])
    both = vmap(lambda p: functional_call(lora, p, (x,)))(params)
    torch.testing.assert_close(both, torch.stack([lora(x), other(x)]))


def test_adapters_of_half_precision_are_single() -> None:
    layer = nn.Linear(4, 3).bfloat16()
    lora = LoRA(layer, rank=2)
    assert next(lora.parameters()).dtype == torch.float32
    assert layer(torch.randn(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_layers_that_cannot_have_adapters_are_left_out_or_refused() -> None:
    attention = nn.ModuleDict(
        {"attn": nn.MultiheadAttention(4, 2), "fc": nn.Linear(4, 4), "dw": nn.Conv2d(4, 4, 3, groups=4)}
    )
    assert LoRA(attention, rank=2).paths == ("fc",)
    with pytest.raises(InputError, match="attn.out_proj' belongs to an nn.MultiheadAttention"):
        LoRA(attention, rank=2, targets=["out_proj"])
    with pytest.raises(InputError, match="'dw' has 4 groups: the rank must be a multiple, not 2"):
        LoRA(attention, rank=2, targets=["dw"])
    with pytest.raises(InputError, match="no linear or 2-D convolutional layer that adapters fit on"):
        LoRA(nn.LayerNorm(3), rank=1)


def test_targets_are_endings_of_whole_names() -> None:
    assert LoRA(net(), 2, targets=["block.2"]).paths == ("block.2",)
    assert LoRA(net(), 2, targets="stem").paths == ("stem",)
    with pytest.raises(InputError, match="matches the target 'lock.2'; there are 'block.2'"):
        LoRA(net(), 2, targets=["lock.2"])
    for wrong, line in (
        ({"rank": 0}, "at least 1"),
        ({"rank": 1, "alpha": -1.0}, "alpha of adapters must be a positive"),
    ):
        with pytest.raises(InputError, match=line):
            LoRA(net(), **wrong)


def test_weights_that_are_no_own_tensor_cannot_be_merged() -> None:
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(InputError, match="one tensor"):
        LoRA(tied, 1, targets=["0"]).merge()
    with pytest.raises(InputError, match="parametrised"):
        LoRA(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), 1).merge()
