"""Guidance adapters: equations against numpy, exactness at the start and when off, injection into any network and back."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from limbeck.blocks.guidance_adapters import (
    AdapterSettings,
    Block,
    CrossAttentionAdapter,
    GatedAdapter,
    OffsetAdapter,
    ScalarEncoder,
    Signal,
    SignalEncoder,
    sinusoidal_positions,
)
from limbeck.blocks.guidance_injection import GuidanceAdapters, attach, listen, select_blocks, time_embedder
from limbeck.core.errors import InputError, UnknownNameError
from limbeck.networks.diffusion_mlp import DiffusionMLP

torch.set_num_threads(1)


def network(seed: int = 0) -> DiffusionMLP:
    torch.manual_seed(seed)
    made = DiffusionMLP((2,), width=8, blocks=2, num_classes=3, time_features=4)
    nn.init.normal_(made.last.weight)
    return made.eval().requires_grad_(False)


X, T, C = torch.randn(5, 2, generator=torch.Generator().manual_seed(1)), torch.rand(5) * 1000, torch.arange(5) % 3
W = torch.tensor([1.5, 2.0, 3.0, 4.5, 6.0])


def adapters_for(net: nn.Module, seed: int = 0, *, start_at_zero: bool = False, **settings) -> GuidanceAdapters:
    torch.manual_seed(seed)
    given = {"dim": 6, "condition": "class", "size": 4, "w_range": (1, 6), "t_range": 1000.0, **settings}
    made = GuidanceAdapters.probe(net, lambda: net(X, T, C), **given)
    if not start_at_zero:
        for adapter in made.adapters:
            nn.init.normal_(adapter.out.weight)
            nn.init.normal_(adapter.out.bias)
    return made.eval()


# ---- the parts ---------------------------------------------------------------------------------------------------------


def test_scalar_encoder_equals_the_equation():
    encoder = ScalarEncoder(4, scale=0.2).double()
    value = torch.tensor([1.0, 3.5], dtype=torch.float64)
    f, p = encoder.frequencies.numpy(), encoder.phases.numpy()
    x = np.cos(2 * np.pi * (0.2 * value.numpy()[:, None] * f + p))
    first, _, second, norm = encoder.layers
    x = np.maximum(x @ first.weight.detach().numpy().T + first.bias.detach().numpy(), 0)
    x = x @ second.weight.detach().numpy().T + second.bias.detach().numpy()
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + norm.eps)
    assert first.out_features == 16
    np.testing.assert_allclose(encoder(value).detach().numpy(), x, atol=1e-10)
    assert {"frequencies", "phases"} <= set(encoder.state_dict())  # fixed, but part of what is saved
    assert (encoder.phases >= 0).all() and (encoder.phases <= 1).all()


def test_cross_attention_equals_the_equation():
    torch.manual_seed(0)
    adapter = CrossAttentionAdapter(3, 5, 4).double()
    nn.init.normal_(adapter.out.weight)
    nn.init.normal_(adapter.out.bias)
    h = torch.randn(2, 7, 3, dtype=torch.float64)
    parts = [torch.randn(2, n, 4, dtype=torch.float64) for n in (1, 1, 3)]
    memory = np.concatenate([p.numpy() for p in parts], 1)
    angle = np.arange(5)[:, None] * np.array([1.0, 10000**-0.5])
    memory = memory + np.concatenate([np.sin(angle), np.cos(angle)], 1).astype(np.float32)
    q, k, v = (
        m @ layer.weight.detach().numpy().T
        for m, layer in ((h.numpy(), adapter.query), (memory, adapter.key), (memory, adapter.value))
    )
    scores = np.exp(q @ k.transpose(0, 2, 1) / math.sqrt(4))
    mixed = scores / scores.sum(-1, keepdims=True) @ v
    expected = mixed @ adapter.out.weight.detach().numpy().T + adapter.out.bias.detach().numpy()
    np.testing.assert_allclose(adapter(h, parts).detach().numpy(), expected, atol=1e-6)
    assert adapter.query.bias is None and adapter.key.bias is None and adapter.value.bias is None


def test_offset_and_gate_use_the_sum_and_the_mean_of_a_prompt():
    parts = [torch.randn(2, n, 4) for n in (1, 1, 3)]
    total = parts[0][:, 0] + parts[1][:, 0] + parts[2].mean(1)
    offset, gated = OffsetAdapter(3, 5, 4, dropout=0.5).eval(), GatedAdapter(3, 5, 4)
    for adapter in (offset, gated):
        nn.init.normal_(adapter.out.weight)
    linear, _, _, norm = offset.layers
    x = torch.relu(total @ linear.weight.T + linear.bias)
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + norm.eps).sqrt()
    h = torch.randn(2, 7, 3)
    found = offset(h, parts)
    assert found.shape == (2, 1, 5)
    torch.testing.assert_close(found[:, 0], x @ offset.out.weight.T + offset.out.bias)
    torch.testing.assert_close(offset(h + 1, parts), found)  # independent of h
    gate = total @ gated.gate.weight.T + gated.gate.bias
    gate = gate * torch.sigmoid(gate)
    expected = (h @ gated.inner.weight.T + gated.inner.bias) * gate[:, None] @ gated.out.weight.T + gated.out.bias
    torch.testing.assert_close(gated(h, parts), expected)


def test_positions_tell_places_apart_and_learned_ones_have_a_limit():
    table = sinusoidal_positions(4, 6)
    assert table.shape == (4, 6) and torch.equal(table[0], torch.tensor([0.0, 0, 0, 1, 1, 1]))
    adapter = CrossAttentionAdapter(3, 3, 4, positions="learned", tokens=3)
    assert adapter.positions is not None and adapter.positions.requires_grad
    with pytest.raises(InputError, match="learned positions for 3 tokens, not for 5"):
        adapter(torch.randn(2, 1, 3), [torch.randn(2, 5, 4)])


@pytest.mark.parametrize("kind", ["cross_attention", "offset", "gated"])
def test_every_adapter_starts_at_exactly_zero(kind):
    made = AdapterSettings((Block("a", 3, 5),), kind=kind, dim=4).adapter(Block("a", 3, 5))
    found = made(torch.randn(2, 7, 3), [torch.randn(2, 1, 4)] * 2)
    assert found.shape[2] == 5 and torch.count_nonzero(found) == 0
    found.sum().backward()
    assert made.out.weight.grad is not None and made.out.bias.grad.abs().sum() > 0  # and can leave it


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"kind": "lora"}, "unknown adapter"),
        ({"dim": 5}, "even"),
        ({"inputs": ("t",)}, "inputs of adapters"),
        ({"condition": "text"}, "unknown kind of condition"),
        ({"positions": "rotary"}, "unknown positions"),
        ({"blocks": ()}, "at least one block"),
    ],
)
def test_wrong_settings_are_named(changes, line):
    with pytest.raises((InputError, UnknownNameError), match=line):
        AdapterSettings(**{"blocks": (Block("a", 3, 5),), **changes})


# ---- on a network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cross_attention", "offset", "gated"])
def test_new_adapters_leave_the_network_as_it_is_and_trained_ones_do_not(kind):
    net = network()
    before = net(X, T, C)
    new = adapters_for(net, kind=kind, start_at_zero=True)
    on = attach(net, new.settings)
    with on.guided(new, W, T, C):
        assert torch.equal(net(X, T, C), before)
    trained = adapters_for(net, kind=kind)
    with on.guided(trained, W, T, C):
        assert not torch.allclose(net(X, T, C), before)
        with on.disabled():
            assert torch.equal(net(X, T, C), before)
    assert torch.equal(net(X, T, C), before)


def test_the_result_is_the_block_plus_the_adapter():
    net = network()
    made = adapters_for(net, blocks="blocks.1")
    assert [b.path for b in made.settings.blocks] == ["blocks.1"]
    inputs: list[Tensor] = []
    handle = net.blocks[1].register_forward_hook(lambda m, a, o: inputs.extend([a[0], o]))
    net(X, T, C)
    handle.remove()
    parts = made.encoders[0](Signal(W, T, C))
    hidden = inputs[1] + made.adapters[0](inputs[0][:, None], parts)[:, 0]
    expected = net.last(torch.nn.functional.silu(net.norm(hidden)))
    with attach(net, made.settings).guided(made, W, T, C):
        torch.testing.assert_close(net(X, T, C), expected)


def test_removing_restores_tree_keys_and_output():
    net = network()
    tree, keys = [(n, type(m)) for n, m in net.named_modules()], list(net.state_dict())
    values = {k: v.clone() for k, v in net.state_dict().items()}
    made = adapters_for(net)
    on = attach(net, made.settings)
    assert list(net.state_dict()) == keys and not set(map(id, made.parameters())) & set(map(id, net.parameters()))
    another = attach(net, made.settings)  # beside the first, and silent until it is told something
    with on.guided(made, W, T, C):
        once = net(X, T, C)
        another.remove()
        assert torch.equal(net(X, T, C), once)
    on.remove()
    assert [(n, type(m)) for n, m in net.named_modules()] == tree and list(net.state_dict()) == keys
    assert all(torch.equal(v, values[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())
    with on.guided(made, W, T, C):
        torch.testing.assert_close(net(X, T, C), network()(X, T, C))


def test_a_batch_of_scales_equals_separate_calls_and_order_does_not_matter():
    net = network()
    made = adapters_for(net)
    on = attach(net, made.settings)
    with on.guided(made, W, T, C):
        together = net(X, T, C)
    for i in range(5):
        with on.guided(made, float(W[i]), T[i : i + 1], C[i : i + 1]):
            torch.testing.assert_close(net(X[i : i + 1], T[i : i + 1], C[i : i + 1])[0], together[i])
    with on.guided(made, W[[1, 0, 2, 3, 4]], T, C):
        assert not torch.allclose(net(X, T, C)[:2], together[:2])


@pytest.mark.parametrize("what", ["w", "t", "c"])
def test_adapters_hear_each_input_and_only_those_that_are_asked_for(what):
    net = network()

    def changed(inputs: tuple[str, ...]) -> bool:
        made = adapters_for(net, inputs=inputs)
        signals = {"w": W.clone(), "t": T.clone(), "c": C.clone()}
        results = []
        for step in (0, 1):
            signals[what] = signals[what] + step
            on = attach(net, made.settings)
            with on.guided(made, signals["w"], signals["t"], signals["c"]):
                results.append(net(X, T, C))  # the network itself is always told the same
            on.remove()
        return not torch.equal(*results)

    assert changed(("w", "t", "c"))
    assert changed(("w",)) == (what == "w")


def test_scale_one_is_the_network_itself_unless_told_otherwise():
    net = network()
    plain = net(X, T, C)
    mixed = torch.tensor([1.0, 3.0, 1.0, 1.0, 2.0])
    for exact in (True, False):
        made = adapters_for(net, exact_one=exact)
        on = attach(net, made.settings)
        with on.guided(made, mixed, T, C):
            same = (net(X, T, C) == plain).all(1)
        assert same.tolist() == ([True, False, True, True, False] if exact else [False] * 5)
        on.remove()


def test_gradients_go_to_the_adapters_only():
    net = network().requires_grad_(True)
    made = adapters_for(net)
    net.requires_grad_(False)
    x = X.clone().requires_grad_(True)
    with attach(net, made.settings).guided(made, W, T, C):
        net(x, T, C).square().sum().backward()
    assert all(p.grad is None for p in net.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())
    assert x.grad.abs().sum() > 0


def test_shared_encoders_are_fewer_and_own_ones_belong_to_their_adapter():
    net = network()
    shared, own = adapters_for(net), adapters_for(net, shared=False)
    assert len(shared.encoders) == 1 and len(own.encoders) == 2
    on = attach(net, own.settings)
    with on.guided(own, W, T, C):
        before = net(X, T, C)
    nn.init.zeros_(own.encoders[1].w.layers[0].weight)
    with on.guided(own, W, T, C):
        assert not torch.allclose(net(X, T, C), before)


def test_the_networks_own_embedders_can_be_reused():
    net = network()
    made = adapters_for(net, reuse={"t": "time", "c": "classes"})
    assert isinstance(made.encoders[0].t, nn.Linear) and made.settings.reuse == {"t": ("time", 8), "c": ("classes", 8)}
    on = attach(net, made.settings)
    outputs = []
    for module in (net.time, net.classes):
        module.register_forward_hook(lambda m, a, o: outputs.append(o))
    with on.guided(made, W, None, None, rows=5):
        found = net(X, T, C)
    parts = SignalEncoder.forward(made.encoders[0], Signal(W, captured={"time": outputs[0], "classes": outputs[1]}))
    torch.testing.assert_close(parts[1][:, 0], made.encoders[0].t(outputs[0]))
    assert not torch.allclose(found, network()(X, T, C))
    late = adapters_for(net, reuse={"t": "last"})
    on.remove()
    with attach(net, late.settings).guided(late, W, T, C), pytest.raises(InputError, match="'last' after the first"):
        net(X, T, C)


def test_copies_of_an_adapted_network_are_independent():
    net = network()
    made = adapters_for(net)
    on = attach(net, made.settings)
    with on.guided(made, W, T, C):
        before = net(X, T, C).sum()
    other_net, other_on, other = copy.deepcopy((net, on, made))
    nn.init.zeros_(other.adapters[0].out.weight)
    with on.guided(made, W, T, C):
        assert torch.equal(net(X, T, C).sum(), before)
        torch.testing.assert_close(other_net(X, T, C), network()(X, T, C))  # its own channel says nothing
    with other_on.guided(other, W, T, C):
        assert not torch.equal(other_net(X, T, C).sum(), before)
    other_on.remove()
    assert any(m._forward_hooks for m in net.modules())
    assert not any(m._forward_hooks for m in other_net.modules())


def test_transfer_to_another_network_and_settings_as_plain_values():
    import json

    net, tuned = network(), network(seed=7)
    made = adapters_for(net, reuse={"t": "time"})
    again = AdapterSettings.from_description(json.loads(json.dumps(made.settings.describe())))
    assert again == made.settings
    other = GuidanceAdapters(again).eval()
    other.load_state_dict(made.state_dict())
    with attach(tuned, again).guided(other, W, T, C):
        assert not torch.allclose(tuned(X, T, C), network(seed=7)(X, T, C))
    with pytest.raises(InputError, match="no block 'time'"):
        attach(nn.Linear(2, 2), again)
    wide = DiffusionMLP((2,), width=12, blocks=2, num_classes=3, time_features=4)
    with (
        attach(wide, adapters_for(net).settings).guided(adapters_for(net), W, T, C),
        pytest.raises(InputError, match=r"'blocks.0' takes a width of 12, but its adapter was made for 8"),
    ):
        wide(X, T, C)


def test_gradient_checkpointing_hears_the_same_signal():
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.block = inner

        def forward(self, h: Tensor) -> Tensor:
            found: Tensor = torch.utils.checkpoint.checkpoint(self.block, h, use_reentrant=False)
            return found

    torch.manual_seed(0)
    net = Checkpointed(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    h = torch.randn(5, 4)
    made = GuidanceAdapters.probe(net, lambda: net(h), blocks="block.0", dim=4, inputs=("w",))
    nn.init.normal_(made.adapters[0].out.weight)
    on = attach(net, made.settings)
    grads = []
    for call in (net, net.block):
        made.zero_grad()
        with on.guided(made, W):
            loss = call(h).square().sum()
        loss.backward()
        grads.append([p.grad.clone() for p in made.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["cross_attention", "offset", "gated"])
def test_maps_and_tuples(kind):
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.Conv2d(3, 5, 1)

        def forward(self, *, context: Tensor | None = None, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            return self.attn(hidden_states), hidden_states

    net = nn.ModuleDict({"joint": Pair()})
    x, context = torch.randn(5, 3, 2, 2), torch.randn(5, 1, 9)

    def run() -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = net["joint"](context=context, hidden_states=x)
        return found

    made = GuidanceAdapters.probe(net, run, blocks="joint", kind=kind, dim=4, inputs=("w",))
    assert made.settings.blocks == (Block("joint", 3, 5),)
    nn.init.normal_(made.adapters[0].out.weight)
    before = run()
    with attach(net, made.settings).guided(made, W):
        after = run()
    added = made.adapters[0](x.flatten(2).transpose(1, 2), made.encoders[0](Signal(W)))
    expected = before[0] + (added.transpose(1, 2).view(5, 5, 2, 2) if kind != "offset" else added[:, 0, :, None, None])
    torch.testing.assert_close(after[0], expected)
    assert torch.equal(after[1], before[1])


def test_blocks_are_found_and_wrong_ones_named():
    net = network()
    assert select_blocks(net) == ["blocks.0", "blocks.1"]
    assert select_blocks(net, lambda path, module: isinstance(module, nn.LayerNorm) and path == "norm") == ["norm"]
    assert time_embedder(net) == "time"
    with pytest.raises(UnknownNameError, match=r"blocks.9"):
        select_blocks(net, "blocks.9")
    with pytest.raises(InputError, match="no block to put an adapter on"):
        select_blocks(nn.Linear(2, 2))
    with pytest.raises(InputError, match="no embedder of times"):
        time_embedder(nn.Linear(2, 2))
    with pytest.raises(InputError, match="must rise"):
        adapters_for(net, w_range=(3, 3))
    made = adapters_for(net)
    on = attach(net, made.settings)
    with on.guided(made, W[:3], T[:3], C[:3]), pytest.raises(InputError, match="sees 5 samples, but there are 3"):
        net(X, T, C)
    with (
        pytest.raises(InputError, match="times must be one number or one for each of the 5"),
        on.guided(made, W, T[:2], C),
    ):
        pass
    with pytest.raises(InputError, match=r"take a condition class ids"), on.guided(made, W, T, torch.randn(5, 3)):
        pass
    with pytest.raises(InputError, match="need the time"), on.guided(made, W, None, C):
        pass


# ---- other libraries' networks -----------------------------------------------------------------------------------------


def unet():  # type: ignore[no-untyped-def]
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def test_unet_of_diffusers_adapters_sit_on_cross_attention_and_hear_calls():
    net = unet().requires_grad_(False)
    x, prompt, k = torch.randn(2, 2, 8, 8), torch.randn(2, 5, 12), torch.tensor(500)
    before = net(x, k, prompt).sample
    keys, processors = list(net.state_dict()), list(net.attn_processors)
    made = GuidanceAdapters.probe(
        net, lambda: net(x, k, prompt), dim=8, condition="tokens", size=12, w_range=(1, 12), t_range=1000.0,
        reuse={"t": "time_embedding"},
    )  # fmt: skip
    assert all(b.path.endswith("attn2") and b.width_in == b.width_out for b in made.settings.blocks)
    assert len(made.settings.blocks) == sum(n.endswith("attn2") for n, _ in net.named_modules()) == 4
    stop = listen(net, made, guidance=torch.tensor([5.0, 7.5]))
    assert torch.equal(net(x, k, encoder_hidden_states=prompt).sample, before)  # zero at the start
    for adapter in made.adapters:
        nn.init.normal_(adapter.out.weight)
    together = net(x, k, encoder_hidden_states=prompt).sample
    assert not torch.allclose(together, before, atol=1e-3)
    assert list(net.state_dict()) == keys and list(net.attn_processors) == processors
    net(x, k, encoder_hidden_states=prompt).sample.sum().backward()
    assert all(p.grad is not None for p in made.parameters())
    stop()
    assert torch.equal(net(x, k, prompt).sample, before)
    stop = listen(net, made, guidance=7.5)
    torch.testing.assert_close(net(x[1:], k, prompt[1:]).sample[0], together[1])
    later = net(x[1:], k + 300, prompt[1:]).sample
    stop()
    assert not torch.allclose(later, net(x[1:], k + 300, prompt[1:]).sample, atol=1e-3)
    with pytest.raises(InputError, match="has no parameter 'class_labels_'"):
        listen(net, made, 5.0, cond="class_labels_")


def test_joint_attention_of_sd3():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=2, out_channels=2, num_layers=2, attention_head_dim=4,
        num_attention_heads=2, joint_attention_dim=6, caption_projection_dim=8, pooled_projection_dim=6,
        pos_embed_max_size=4,
    ).eval()  # fmt: skip
    x, text, pooled, k = torch.randn(2, 2, 4, 4), torch.randn(2, 3, 6), torch.randn(2, 6), torch.tensor([400.0, 400.0])

    def run() -> Tensor:
        found: Tensor = net(x, text, pooled, k).sample
        return found

    made = GuidanceAdapters.probe(net, run, dim=4, condition="tokens", size=6, t_range=1000.0)
    assert [b.path for b in made.settings.blocks] == ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]
    before = run()
    for adapter in made.adapters:
        nn.init.normal_(adapter.out.weight)
    stop = listen(net, made, 4.0)
    assert not torch.allclose(run(), before)
    stop()
    assert torch.equal(run(), before)
