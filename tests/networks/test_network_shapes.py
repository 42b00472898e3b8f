from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from limbeck.networks import build
from limbeck.networks.base import isotropic_stages
from limbeck.networks.convnet import ConvNet
from limbeck.networks.mixer import MixerBlock
from limbeck.networks.resnet import PreActBlock

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32)]
TINY = [
    "convnet-w8-d3",
    "convnet-w8-d2-batch",
    "convnet-w8-d2-layer",
    "convnet-w8-d2-none",
    "cnn-w4-s3",
    "resnet8",
    "resnet8x4",
    "wrn-10-1",
    "vit-d16-l4-h4-p2",
    "mixer-d16-l4-p2",
    "mlp-32-16",
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def outputs(net: nn.Module, paths: list[str], x: Tensor) -> list[Tensor]:
    seen: dict[str, Tensor] = {}
    modules = dict(net.named_modules())
    hooks = [modules[p].register_forward_hook(lambda _, __, out, p=p: seen.__setitem__(p, out)) for p in paths]
    net(x)
    for hook in hooks:
        hook.remove()
    return [seen[path] for path in paths]


@pytest.mark.parametrize("in_shape", SHAPES)
@pytest.mark.parametrize("name", TINY)
def test_logits_features_and_taps(name: str, in_shape: tuple[int, int, int]) -> None:
    net = build(name, in_shape=in_shape, num_classes=10).eval()
    x = torch.randn(2, *in_shape)
    assert net(x).shape == (2, 10)
    assert (net.in_shape, net.num_classes) == (in_shape, 10)
    features = net.embed(x)
    assert features.shape == (2, net.feature_dim)
    torch.testing.assert_close(net(x), net.get_submodule(net.head_path)(features))
    assert 1 <= len(net.stage_paths) <= 4
    stages = outputs(net, net.stage_paths, x)
    if net.grid:
        tokens = net.prefix_tokens + net.grid[0] * net.grid[1]
        assert all(stage.shape == (2, tokens, net.feature_dim) for stage in stages)
    elif not name.startswith("mlp"):
        sides = [stage.shape[-1] for stage in stages]
        assert all(stage.ndim == 4 for stage in stages)
        assert sides == sorted(sides, reverse=True) and sides[-1] < in_shape[-1]


def parameters(name: str, in_shape: tuple[int, int, int] = (3, 32, 32), num_classes: int = 100) -> int:
    return sum(p.numel() for p in build(name, in_shape=in_shape, num_classes=num_classes).parameters())


@pytest.mark.parametrize(
    ("name", "count"),
    [  # CIFAR-100, as counted for the networks of the usual teacher-student pairs
        ("resnet8x4", 1_233_540),
        ("resnet20", 278_324),
        ("resnet56", 861_620),
        ("resnet32x4", 7_433_860),
        ("wrn-16-2", 703_284),
        ("wrn-40-1", 569_780),
        ("wrn-40-2", 2_255_156),
    ],
)
def test_residual_networks_have_the_published_size(name: str, count: int) -> None:
    assert parameters(name) == count


def test_resnet20_has_a_quarter_million_parameters_on_cifar10() -> None:
    assert parameters("resnet20", num_classes=10) == 272_474


def test_convnet_has_the_published_size() -> None:
    assert parameters("convnet-w128-d3", num_classes=10) == 320_010
    assert parameters("convnet-w128-d3", (1, 28, 28), 10) == 317_706  # on MNIST, padded to 32x32


def test_depth_of_residual_networks_counts_their_layers() -> None:
    resnet, wide = (build(name, in_shape=(3, 32, 32), num_classes=10) for name in ("resnet56", "wrn-40-2"))
    kernels = [m.kernel_size for m in resnet.modules() if isinstance(m, nn.Conv2d)]
    assert kernels.count((3, 3)) + 1 == 56  # and the head; shortcuts are not counted
    assert sum(isinstance(m, nn.Conv2d) for m in wide.modules()) == 40  # the three shortcuts are, the head is not


def test_vit_tokens_and_transformers_round_trip() -> None:
    net = build("vit-d16-l2-h4-p4", in_shape=(1, 8, 8), num_classes=3).eval()
    assert (net.prefix_tokens, net.grid) == (1, (2, 2))
    whole = net.to_transformers().eval()
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(whole(pixel_values=x).logits, net(x))
    assert whole.state_dict().keys() == net.state_dict().keys()
    assert whole.classifier is net.classifier


def test_vit_weights_start_at_the_scale_of_their_width() -> None:
    for width in (16, 64):
        net = build(f"vit-d{width}-l2-h4-p4", in_shape=(1, 8, 8), num_classes=3)
        linear = [m.weight for m in net.vit.modules() if isinstance(m, nn.Linear)]
        assert all(w.std().item() == pytest.approx(width**-0.5, rel=0.15) for w in linear)


def test_no_network_draws_random_numbers_in_training() -> None:
    for name in ("vit-d16-l2-h4-p4", "mixer-d16-l2-p4", "convnet-w8-d2"):
        net = build(name, in_shape=(1, 8, 8), num_classes=3).train()
        x = torch.randn(2, 1, 8, 8)
        torch.testing.assert_close(net(x), net(x), rtol=0, atol=0)


def test_rectangular_images() -> None:
    for name in ("convnet-w8-d2", "cnn-w4-s3", "resnet8", "vit-d16-l2-h4-p4", "mixer-d16-l2-p4", "mlp-8"):
        assert build(name, in_shape=(2, 8, 16), num_classes=3).eval()(torch.randn(1, 2, 8, 16)).shape == (1, 3)


def test_convnet_on_digits_ends_at_one_pixel() -> None:
    net = build("convnet-w8-d3", in_shape=(1, 8, 8), num_classes=10)
    x = torch.randn(2, 1, 8, 8)
    assert [tuple(stage.shape[1:]) for stage in outputs(net, net.stage_paths, x)] == [(8, 4, 4), (8, 2, 2), (8, 1, 1)]
    assert net.feature_dim == 8


def test_instance_norm_is_per_sample_and_channel() -> None:
    net = ConvNet((1, 8, 8), 3, width=4, depth=1)
    x = torch.randn(3, 1, 8, 8)
    conv, norm = net.blocks[0][0], net.blocks[0][1]
    torch.testing.assert_close(norm(conv(x)), nn.functional.instance_norm(conv(x)))


def test_mixer_block_against_its_equations() -> None:
    block = MixerBlock(tokens=5, width=6, token_hidden=3, channel_hidden=7)
    x = torch.randn(2, 5, 6)
    one, two = block.token_mlp[0], block.token_mlp[2]
    z = block.norm1(x)
    hidden = nn.functional.gelu(torch.einsum("bnd,hn->bhd", z, one.weight) + one.bias[None, :, None])
    u = x + torch.einsum("bhd,nh->bnd", hidden, two.weight) + two.bias[None, :, None]
    torch.testing.assert_close(block(x), u + block.channel_mlp(block.norm2(u)))


def test_pre_activated_block_keeps_the_raw_input_in_an_identity_shortcut() -> None:
    same = PreActBlock(4, 4, 1)
    nn.init.zeros_(same.conv2.weight)
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(same(x), x, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("depth", "stages"), [(12, [1, 3, 9, 11]), (24, [3, 7, 19, 23]), (6, [0, 1, 4, 5]), (4, [0, 1, 3]), (1, [0])]
)
def test_isotropic_stages(depth: int, stages: list[int]) -> None:
    assert isotropic_stages(depth) == stages


@pytest.mark.parametrize("name", TINY)
def test_functional_call_and_vmap_over_an_ensemble(name: str) -> None:
    nets = [build(name, in_shape=(1, 8, 8), num_classes=4).eval() for _ in range(3)]
    params, buffers = stack_module_state(nets)
    skeleton = copy.deepcopy(nets[0]).to("meta")
    x = torch.randn(5, 1, 8, 8)

    def logits(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(skeleton, (p, b), (x,))

    stacked = vmap(logits, in_dims=(0, 0, None))(params, buffers, x)
    torch.testing.assert_close(stacked, torch.stack([net(x) for net in nets]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["convnet-w8-d3", "vit-d16-l4-h4-p2", "mixer-d16-l4-p2", "mlp-32-16"])
def test_second_order_gradients_reach_the_input(name: str) -> None:
    net = build(name, in_shape=(1, 8, 8), num_classes=4).train()
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    grads = torch.autograd.grad(net(x).logsumexp(1).sum(), list(net.parameters()), create_graph=True)
    (meta,) = torch.autograd.grad(sum(g.square().sum() for g in grads), x)
    assert torch.isfinite(meta).all() and meta.abs().sum() > 0
