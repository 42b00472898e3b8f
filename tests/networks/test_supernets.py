"""Super-networks: cut sub-networks with equal outputs that rebuild by name, costs, sampling, a user's own, bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.errors import InputError
from limbeck.metrics.cost import count_flops, count_parameters
from limbeck.networks import build, rebuild, spec_of
from limbeck.networks.supernets import Knob, SuperNetwork

NAMES = ["elasticmlp-d16-m32-l3", "elasticmbconv-w4-s2-d2-e4-k5", "elasticcnn-w8-s2-d2", "elasticvit-d12-k4-l3-h3-m24"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make(name: str) -> SuperNetwork:
    net = build(name, in_shape=(1, 8, 8), num_classes=5)
    assert isinstance(net, SuperNetwork)
    net(torch.randn(16, 1, 8, 8))  # running statistics that are not those of a fresh network
    return net.eval()


@pytest.mark.parametrize("name", NAMES)
def test_extracted_networks_are_the_active_ones_and_rebuild_by_name(name: str) -> None:
    net, x = make(name), torch.randn(4, 1, 8, 8)
    generator = torch.Generator().manual_seed(1)
    state = torch.get_rng_state()
    for code in (net.smallest, net.largest, *(net.sample(generator) for _ in range(4))):
        plain = net.extract(code)
        assert net.active == net.largest and torch.equal(torch.get_rng_state(), state)
        net.set_active(code)
        expected = net(x)
        net.set_active(net.largest)
        assert torch.equal(plain(x), expected)
        twin = rebuild(spec_of(plain))
        twin.load_state_dict(plain.state_dict())
        assert type(twin) is type(plain) and torch.equal(twin.eval()(x), expected)
        fresh = net.space.build(code)
        assert spec_of(fresh) == spec_of(plain) and count_parameters(fresh) == count_parameters(plain)
        assert net.costs(code) == {"parameters": count_parameters(plain), "flops": count_flops(plain, x)}
        torch.set_rng_state(state)


@pytest.mark.parametrize("name", NAMES)
def test_sorting_leaves_the_full_network_and_orders_the_middles(name: str) -> None:
    net, x = make(name), torch.randn(4, 1, 8, 8)
    before, narrow = net(x), net.extract(net.smallest)(x)
    assert net.sort_channels() == sum(knob.kind == "width" for knob in net.knobs)
    torch.testing.assert_close(net(x), before)
    assert not torch.allclose(net.extract(net.smallest)(x), narrow)


def test_equal_sub_networks_have_one_canonical_code() -> None:
    net = make("elasticmlp-d16-m32-l3")
    a, b = (net.space.code(depth=1, hidden1=8, hidden2=h, hidden3=h) for h in (4, 32))
    assert a != b and net.canonical(a) == net.canonical(b) and net.costs(a) == net.costs(b)
    assert net.canonical(net.largest) == net.largest
    assert len({net.canonical(code) for code in net.space}) == 4 + 16 + 64
    assert len(list(net.uniform())) == 12


def test_sampling_is_uniform_bounded_and_coupled() -> None:
    net = make("elasticmbconv-w4-s2-d2-e4-k5")
    generator = torch.Generator().manual_seed(0)
    drawn = [net.sample(generator) for _ in range(300)]
    for at, knob in enumerate(net.knobs):
        assert {code[at] for code in drawn} == set(range(len(knob.options)))
    least = {"width": 2, "depth": 1, "kernel": 9}
    for code in (net.sample(generator, least=least) for _ in range(50)):
        for number, knob in zip(code, net.knobs, strict=True):
            assert number >= min(least[knob.kind], len(knob.options) - 1)
    coupled = {net.sample(generator, coupled=True) for _ in range(60)}
    assert len(coupled) == 4  # two depths in each of two stages
    for code in coupled:
        options = net.space.options(code)
        for s in (1, 2):
            widths = {options[f"width{s}_{i}"] // net.knobs[0 if s == 1 else 5].options[0] for i in (1, 2)}
            assert widths  # one rank for the stage, given by its depth
            ranks = {code[n] for n, k in enumerate(net.knobs) if k.name.startswith(f"width{s}")}
            assert ranks == ({3} if options[f"depth{s}"] == 2 else {0})
        assert all(options[k.name] == 5 for k in net.knobs if k.kind == "kernel")


def test_a_copy_is_a_network_of_its_own() -> None:
    net = make("elasticmlp-d16-m32-l3")
    twin = copy.deepcopy(net)
    twin.set_active(twin.smallest)
    assert net.active == net.largest and twin.active == twin.smallest
    assert torch.equal(net.extract(net.smallest)(torch.ones(1, 1, 8, 8)), twin(torch.ones(1, 1, 8, 8)))


class Own(nn.Module):
    """Somebody's own network, with a recurrent layer in it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 4)
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)])
        self.rnn = nn.GRU(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.blocks(self.fc2(self.fc1(x).relu()))[:, None])[0][:, -1]


def own(*knobs: Knob) -> SuperNetwork:
    return SuperNetwork(Own(), knobs, torch.zeros(1, 6))


def test_own_network() -> None:
    net = own(Knob("hidden", "width", ("fc1",), (2, 4, 8), into="fc2"), Knob("depth", "depth", ("blocks",), (1, 2)))
    x = torch.randn(3, 6)
    code = net.space.code(hidden=4, depth=1)
    plain = net.extract(code)
    net.set_active(code)
    assert torch.equal(plain(x), net(x)) and type(plain) is Own and spec_of(plain) is None
    assert type(plain.fc1) is nn.Linear and plain.fc1.out_features == 4 and len(plain.blocks) == 1


@pytest.mark.parametrize(
    ("knob", "says"),
    [
        (Knob("h", "width", ("rnn",), (1, 3)), r"layer 'rnn' \(GRU\) cannot be cut: there is no elastic form"),
        (
            Knob("h", "width", ("fc2", "blocks.0.0", "blocks.1.0"), (2, 4)),
            r"the sub-network 2 does not run: layer 'rnn' \(GRU\) cannot be cut",
        ),
        (Knob("h", "width", ("fc9",), (2, 4)), "names layer 'fc9', which the network does not have"),
        (Knob("h", "width", ("fc1",), (4, 2)), "ascending options"),
        (Knob("h", "width", ("fc1",), (2, 16)), "goes up to 16, but the width of layer 'fc1' is 8"),
        (Knob("h", "kernel", ("fc1",), (3, 5)), r"layer 'fc1' \(Linear\) has no kernel to set"),
        (
            Knob("h", "depth", ("fc1",), (1, 2)),
            r"stage 'fc1' \(Linear\) cannot be cut: its depth needs an nn.Sequential",
        ),
        (Knob("h", "width", ("fc1",), (2, 8), group=4), "whole groups of 4"),
    ],
)
def test_what_cannot_be_cut_gives_one_line(knob: Knob, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        own(knob)
    assert "\n" not in str(caught.value)


def test_even_crops_and_grouped_convolutions() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 5, padding=2), nn.Conv2d(4, 4, 3, padding=1, groups=2))
    with pytest.raises(InputError, match="takes options 1, 3, 5"):
        SuperNetwork(net, [Knob("k", "kernel", ("0",), (2, 5))], torch.zeros(1, 2, 6, 6))
    with pytest.raises(InputError, match="4 channels are in 2 groups"):
        SuperNetwork(net, [Knob("w", "width", ("1",), (2, 4))], torch.zeros(1, 2, 6, 6))
    with pytest.raises(InputError, match=r"layer '1' \(Conv2d\) cannot be cut: its 4 channels are in 2 groups"):
        SuperNetwork(net, [Knob("w", "width", ("0",), (2, 4))], torch.zeros(1, 2, 6, 6))


def test_names_that_do_not_fit() -> None:
    for name, says in [
        ("mbconv-d12-65-63", "3 blocks in stages of at least one, but 2"),
        ("mbconv-d1-64", "odd kernel side"),
        ("rescnn-d2-8", "2 blocks"),
        ("slimvit-4-96-2", "heads and a hidden width"),
        ("elasticmbconv-k4", "largest kernel"),
    ]:
        with pytest.raises(InputError, match=says):
            build(name, in_shape=(1, 8, 8), num_classes=5)
