from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from limbeck.blocks.diffusion_discriminators import (
    LevelDiscriminator,
    PairDiscriminator,
    PooledHead,
    ResidualHead,
    Trunk,
    default_layers,
)
from limbeck.core.errors import InputError, UnknownNameError

torch.set_num_threads(1)


class TinyUNet(nn.Module):
    """Two levels down, a middle, and a way up that complains when it is run."""

    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)])
        self.mid_block = nn.Conv2d(8, 8, 3, 1, 1)
        self.up = nn.ConvTranspose2d(8, 1, 4, 4)
        self.time = nn.Linear(1, 8)
        self.ups = 0

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        h = x
        for block in self.down_blocks:
            h = torch.tanh(block(h))
        h = self.mid_block(h + self.time(t[:, None])[..., None, None])
        if cond is not None:
            h = h + cond[:, None, None, None]
        self.ups += 1
        return self.up(h)


class TinyMLP(nn.Module):
    def __init__(self, tokens: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        h = self.first(x) + t.reshape(-1, *(1,) * (x.ndim - 1))
        for block in self.blocks:
            h = h + torch.tanh(block(h))
        return self.last(h)


def maps(n: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, 16, 16, generator=g), torch.rand(n, generator=g), torch.rand(n, generator=g)


def test_the_trunk_ends_where_enough_is_known_and_gives_the_layers_outputs():
    net = TinyUNet()
    trunk = Trunk(net, ["mid_block", "down_blocks.0"], trainable=False)
    x, t, c = maps()
    middle, first = trunk(x, t, c)
    assert net.ups == 0
    torch.testing.assert_close(first, net.down_blocks[0](x))
    h = torch.tanh(net.down_blocks[1](torch.tanh(first)))
    torch.testing.assert_close(middle, net.mid_block(h + net.time(t[:, None])[..., None, None]))
    net(x, t, c)  # no hook was left behind
    assert net.ups == 1 and not list(trunk.parameters())


def test_a_trainable_trunk_is_a_copy_that_starts_as_the_teacher():
    net = TinyUNet().requires_grad_(False)
    discriminator = PairDiscriminator(net, maps())
    held = discriminator.trunk.network
    assert held is not net and all(torch.equal(a, b) for a, b in zip(held.parameters(), net.parameters(), strict=True))
    x, t, c = maps()
    logits = discriminator(x, t, c, torch.randn_like(x), t)
    assert logits.shape == (3, 1)
    logits.sum().backward()
    assert held.mid_block.weight.grad is not None and all(p.grad is None for p in net.parameters())
    assert any(p is q for p in discriminator.parameters() for q in held.parameters())


def test_pairs_are_joined_in_order_and_the_source_matters():
    torch.manual_seed(0)
    net, (x, t, c) = TinyUNet(), maps()
    discriminator = PairDiscriminator(net, (x, t, c), trainable=False).eval()
    source, later = torch.randn_like(x), t + 0.3
    (own,), (other,) = discriminator.trunk(x, t, c), discriminator.trunk(source, later, c)
    expected = discriminator.heads[0](torch.cat([own, other], 1))
    torch.testing.assert_close(discriminator(x, t, c, source, later), expected)
    assert not torch.allclose(discriminator(source, later, c, x, t), expected)
    with pytest.raises(InputError, match="judges pairs"):
        discriminator(x, t, c)
    alone = PairDiscriminator(net, (x, t, c), pair=False, trainable=False)
    assert alone(x, t, c).shape == (3, 1)


@pytest.mark.parametrize("tokens", [False, True])
def test_vectors_and_tokens_have_linear_heads(tokens):
    net = TinyMLP()
    x = torch.randn(5, 7, 4) if tokens else torch.randn(5, 4)
    t = torch.rand(5)
    pair = PairDiscriminator(net, (x, t, None))
    assert not any(isinstance(m, nn.Conv2d) for m in pair.heads.modules())
    assert pair(x, t, None, x, t).shape == (5, 1)
    levels = LevelDiscriminator(net, (x, t, None))
    assert len(levels.heads) == 3
    assert levels(x, t).shape == (5, 3 * (7 if tokens else 1))


def test_levels_give_a_logit_for_each_position_and_gradients_to_the_samples_only():
    net = TinyUNet().requires_grad_(False)
    x, t, c = maps()
    discriminator = LevelDiscriminator(net, (x, t, c))
    x.requires_grad_(True)
    logits = discriminator(x, t, c)
    assert logits.shape == (3, 8 * 8 + 4 * 4 + 4 * 4)
    logits.mean().backward()
    assert bool((x.grad != 0).any()) and all(p.grad is None for p in net.parameters())
    assert all(p.grad is not None for p in discriminator.parameters())
    assert not any(name.startswith("trunk") for name in discriminator.state_dict())


def test_default_layers():
    assert default_layers(TinyUNet(), maps()) == ["mid_block"]
    assert default_layers(TinyUNet(), maps(), levels=True) == ["down_blocks.0", "down_blocks.1", "mid_block"]
    vectors = (torch.randn(2, 4), torch.rand(2), None)
    assert default_layers(TinyMLP(), vectors) == ["blocks.1"]
    assert default_layers(TinyMLP(), vectors, levels=True) == ["blocks.0", "blocks.1", "blocks.2"]

    class Plain(nn.Module):
        def forward(self, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
            return x

    with pytest.raises(InputError, match="Plain has no list of blocks"):
        default_layers(Plain(), vectors)


def test_pooled_head_shrinks_with_the_map_and_averages_positions():
    assert PooledHead(torch.zeros(2, 4, 1, 1))(torch.randn(2, 4, 1, 1)).shape == (2, 1)
    large = PooledHead(torch.zeros(2, 64, 16, 16), blocks=3, width=32)
    assert [m.stride for m in large.layers if isinstance(m, nn.Conv2d)] == [(2, 2), (2, 2), (2, 2), (1, 1)]
    assert [m.num_groups for m in large.layers if isinstance(m, nn.GroupNorm)] == [
        32,
        32,
        16,
    ]  # 2x2 pixels hold fewer values
    small = PooledHead(torch.zeros(2, 6, 2, 3))
    assert sum(isinstance(m, nn.Conv2d) for m in small.layers) == 2 and small.layers[1].num_groups == 1
    tokens = torch.randn(3, 5, 6)
    head = PooledHead(tokens)
    by_hand = torch.stack([head.layers(tokens[:, i]) for i in range(5)]).mean(0)
    torch.testing.assert_close(head(tokens), by_hand)


def test_residual_head_by_hand():
    torch.manual_seed(0)
    feature = torch.randn(2, 4, 3, 3)
    head = ResidualHead(feature)
    hidden = head.first(feature)
    torch.testing.assert_close(head(feature), head.last(hidden + head.second(hidden)).flatten(1))


def test_a_copy_of_a_discriminator_is_independent():
    discriminator = PairDiscriminator(TinyMLP(), (torch.randn(2, 4), torch.rand(2), None))
    twin = copy.deepcopy(discriminator)
    x, t = torch.randn(3, 4), torch.rand(3)
    torch.testing.assert_close(twin(x, t, None, x, t), discriminator(x, t, None, x, t))
    with torch.no_grad():
        for p in twin.trunk.network.parameters():
            p.add_(1.0)
    assert not torch.allclose(twin(x, t, None, x, t), discriminator(x, t, None, x, t))


def test_bad_input_is_named():
    net = TinyMLP()
    sample = (torch.randn(2, 4), torch.rand(2), None)
    with pytest.raises(UnknownNameError, match="blocs"):
        PairDiscriminator(net, sample, ["blocs.1"])
    with pytest.raises(InputError, match="at least one layer"):
        LevelDiscriminator(net, sample, [])
    with pytest.raises(InputError, match="at least one block"):
        PooledHead(torch.zeros(2, 4), 0)
    with pytest.raises(InputError, match="maps"):
        PooledHead(torch.zeros(2, 4, 2, 2, 2))


def test_layers_that_do_not_see_the_sample_are_not_looked_at() -> None:
    from limbeck.networks.diffusion_mlp import DiffusionMLP

    network = DiffusionMLP(
        (2,), width=8, blocks=3
    )  # its list of time layers is as long as that of its blocks, and comes first
    x, t = torch.randn(4, 2), torch.rand(4)
    assert default_layers(network, (x, t)) == ["blocks.1"]
    assert default_layers(network, (x, t), levels=True) == ["blocks.0", "blocks.1", "blocks.2"]
    seen = x.clone().requires_grad_()
    score = PairDiscriminator(network, (x, t, None))(seen, t, None, x, t)
    (gradient,) = torch.autograd.grad(score.sum(), seen)
    assert bool((gradient.abs().sum(1) > 0).all())
    assert all(p.requires_grad for p in network.parameters())
