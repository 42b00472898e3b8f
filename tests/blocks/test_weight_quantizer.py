"""Quantisers on any module, files of quantised networks, and shared budgets of levels."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from limbeck.blocks.level_allocation import gradient_norms, share_bits, share_levels
from limbeck.blocks.packed import load_packed, load_state, pack_codes, save_packed, stored, unpack_codes
from limbeck.blocks.quantizers import encode, quantise
from limbeck.blocks.weight_quantizer import WeightQuantizer, attach_quantizers, original, plain_copy, quantizers_of
from limbeck.core.errors import InputError, RunError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))


def test_layers_compute_with_quantised_weights_and_the_optimiser_sees_the_others() -> None:
    model = network()
    before = copy.deepcopy(model)
    made = attach_quantizers({"3": model[3]}, lambda name: WeightQuantizer(4, 32))
    x = torch.randn(2, 1, 8, 8)
    expected = copy.deepcopy(before)
    with torch.no_grad():
        expected[3].weight.copy_(quantise(before[3].weight, 4, 32))
    torch.testing.assert_close(model.eval()(x), expected.eval()(x))
    assert torch.equal(original(model[3]), before[3].weight)
    assert list(made) == list(quantizers_of(model)) == ["3"]
    made["3"].mode = "off"
    torch.testing.assert_close(model(x), before.eval()(x))


def test_the_plain_copy_is_plain_and_leaves_the_original_alone() -> None:
    model = network()
    attach_quantizers({"0": model[0], "3": model[3]}, lambda name: WeightQuantizer(4, 32))
    x = torch.randn(2, 1, 8, 8)
    plain = plain_copy(model)
    assert type(plain[0]) is nn.Conv2d
    assert set(plain.state_dict()) == set(network().state_dict())
    assert torch.equal(plain(x), model.eval()(x))
    assert torch.equal(plain_copy(model)(x), model(x))  # the first copy took nothing away
    assert torch.equal(plain_copy(model, "off")[0].weight, original(model[0]))


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight

    model = Tied()
    made = attach_quantizers({"embedding": model.embedding, "head": model.head}, lambda name: WeightQuantizer(4, 8))
    assert list(made) == ["embedding"]
    assert original(model.embedding) is original(model.head)
    plain = plain_copy(model)
    assert plain.embedding.weight is plain.head.weight


def test_a_state_with_other_numbers_of_levels_loads() -> None:
    one, two = network(), network()
    for model, count in ((one, 4), (two, 7)):
        attach_quantizers({"0": model[0]}, lambda name, count=count: WeightQuantizer(count, mode="learned"))
    quantizers_of(two)["0"].place_levels(original(two[0]), 7)
    one.load_state_dict(two.state_dict())
    assert torch.equal(one[0].weight, two[0].weight)


def test_rounding_at_random_stops_in_evaluation() -> None:
    model = network()
    attach_quantizers({"3": model[3]}, lambda name: WeightQuantizer(4, 32, stochastic=True))
    assert not torch.equal(model[3].weight, model[3].weight)
    model.eval()
    assert torch.equal(model[3].weight, model[3].weight)


def test_what_cannot_be_quantised_is_named() -> None:
    model = network()
    attach_quantizers({"0": model[0]}, lambda name: WeightQuantizer(4))
    with pytest.raises(InputError, match="'0' is parametrised already"):
        attach_quantizers({"0": model[0]}, lambda name: WeightQuantizer(4))
    with pytest.raises(InputError, match=r"'2' \(Flatten\) has no parameter 'weight'"):
        attach_quantizers({"2": model[2]}, lambda name: WeightQuantizer(4))


# ---- files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_packed_without_gaps(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, 101).astype(np.uint8)
    data = pack_codes(codes, bits)
    assert len(data) == -(-101 * bits // 8)
    assert np.array_equal(unpack_codes(data, bits, 101), codes)
    with pytest.raises(RunError, match="ends too early"):
        unpack_codes(data[:-1], bits, 101)


def test_a_file_gives_every_value_back_and_takes_what_is_said(tmp_path: Path) -> None:
    torch.manual_seed(1)
    skewed = torch.randn(40, 50) ** 3
    tensors = {
        "a": encode(torch.rand(30, 33), 4, 256),
        "b": encode(skewed, 8, 256),
        "c": encode(skewed, torch.tensor([0.0, 0.3, 0.5, 0.55, 1.0]), None),
    }
    file, plain = tmp_path / "q.safetensors", {"bias": torch.randn(5)}
    save_packed(file, tensors, plain, {"d": "a"})
    state = load_state(file)
    assert set(state) == {"a", "b", "c", "d", "bias"}
    for name, tensor in tensors.items():
        assert torch.equal(state[name], tensor.restored())
    assert torch.equal(state["d"], state["a"])
    assert torch.equal(state["bias"], plain["bias"])
    forms = {name: stored(tensor).form for name, tensor in tensors.items()}
    assert forms == {"a": "quantised", "b": "huffman", "c": "huffman"}
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    assert (file.stat().st_size - header) * 8 == sum(stored(t).bits for t in tensors.values()) + 5 * 32
    assert load_packed(file)[2] == {"d": "a"}


def test_size_ratio_is_that_of_the_paper() -> None:
    """32 / (b + 64 / k) for codes that are used alike."""
    tensor = encode(torch.rand(512, 256), 16, 256)
    size = stored(tensor)
    assert 32 * size.numbers / size.bits == pytest.approx(32 / (4 + 64 / 256), rel=0.02)


def test_other_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "plain.safetensors")
    (tmp_path / "noise.safetensors").write_bytes(b"no such thing")
    for name in ("plain", "noise", "absent"):
        with pytest.raises(RunError, match="holds no quantised network"):
            load_state(tmp_path / f"{name}.safetensors")


# ---- shared budgets ------------------------------------------------------------------------------------------------------


def test_levels_are_shared_by_gradients() -> None:
    """4 levels for each of three tensors: 2 each are given, 6 are shared 3 : 2 : 1."""
    assert share_levels([4, 4, 4], [3.0, 2.0, 1.0]) == [5, 4, 3]
    assert share_bits([4, 4, 4], [3.0, 2.0, 1.0]) == [5, 4, 3]  # 3 each, 3 shared, 1.5 rounds to 2, 0.5 to 0
    assert share_levels([4, 4], [0.0, 0.0]) == [4, 4]


@pytest.mark.parametrize("seed", range(5))
def test_the_budget_is_kept(seed: int) -> None:
    rng = np.random.default_rng(seed)
    wanted = rng.integers(2, 17, 7).tolist()
    given = share_levels(wanted, rng.random(7) ** 3)
    assert sum(given) == sum(wanted)
    assert min(given) >= 2
    assert max(share_bits([8, 8, 8], [1.0, 0.0, 0.0])) == 8


def test_gradient_norms_leave_no_trace() -> None:
    model = network().train()
    model[0].weight.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(3, 6, 1, 8, 8)

    def loss(batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().sum()

    norms = gradient_norms(model, loss, [model[0].weight, model[3].weight], x)
    assert not model[0].weight.requires_grad
    assert model[3].weight.grad is None
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    sum(loss(batch) for batch in x).backward()
    assert norms[1] == pytest.approx(model[3].weight.grad.norm().item() / 3, rel=1e-5)
