from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.errors import InputError, UnknownNameError
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.extra_time import GuidanceScale, TargetTime, embedding_width, time_layer
from limbeck.diffusion.schedules import EDM, Flow, Schedule, VPCosine, VPDiscrete

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time_embed = nn.Linear(1, 5)
        self.line = nn.Linear(3 + 5, 3)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.line(torch.cat([x, torch.tanh(self.time_embed(t[:, None] / 1000))], 1))


def wrapped(schedule: Schedule | None = None) -> TargetTime:
    torch.manual_seed(0)
    return TargetTime(Net(), schedule or Flow(), 5)


def awake(network: TargetTime) -> TargetTime:
    """With an embedding that does something."""
    nn.init.normal_(network.embed[2].weight)
    return network


def test_at_first_it_is_the_network_it_was():
    network = wrapped()
    x, t = torch.randn(4, 3), torch.rand(4) * 1000
    torch.testing.assert_close(network(x, t), network.network(x, t))
    network(x, t).sum().backward()
    assert network.embed[2].weight.grad.abs().sum() > 0  # and it can learn


def test_the_number_is_added_to_the_embedding_of_the_time():
    network = awake(wrapped())
    x, t, s = torch.randn(4, 3), torch.rand(4) * 1000, torch.rand(4)
    with network.told(s):
        found = network(x, t)
    inner = network.network
    rates = torch.exp(-math.log(1e4) * torch.arange(16) / 16)
    angles = 1000 * s[:, None] * rates
    embedded = inner.time_embed(t[:, None] / 1000) + network.embed(torch.cat([angles.cos(), angles.sin()], 1))
    torch.testing.assert_close(found, inner.line(torch.cat([x, torch.tanh(embedded)], 1)))
    assert not inner.time_embed._forward_hooks
    assert not torch.allclose(found, network(x, t))


def test_guidance_repeats_the_numbers_and_one_number_serves_all():
    network = awake(wrapped())
    denoiser = Denoiser(network, Flow(), "flow", null_cond=torch.tensor(3))
    x, t, s = torch.randn(4, 3), torch.full((4,), 0.6), torch.rand(4)
    cond = torch.zeros(4, dtype=torch.long)
    with network.told(s):
        torch.testing.assert_close(denoiser.predict(x, t, cond, guidance=3.0), denoiser.predict(x, t))
    with network.told(torch.tensor(0.25)):
        one = network(x, t)
    with network.told(torch.full((4,), 0.25)):
        torch.testing.assert_close(network(x, t), one)
    with network.told(torch.rand(3)), pytest.raises(InputError, match="4 samples but 3 numbers"):
        network(x, t)


@pytest.mark.parametrize("schedule", [Flow(), VPCosine(), VPDiscrete(), EDM()])
def test_on_a_grid_it_aims_at_the_next_time(schedule: Schedule):
    network = wrapped(schedule)
    grid = schedule.times(8)
    aimed = network.on_grid(grid)
    asked = schedule.to_model_time(grid[:-1].float())
    torch.testing.assert_close(aimed.default(asked), network.share(grid[1:].float()), atol=1e-6, rtol=1e-5)
    assert network.grid == () and aimed.embed is network.embed
    assert aimed.default(asked)[-1] == 0  # the last jump ends at the sample
    assert bool((network.default(asked) == 0).all())


def test_shares_go_from_clean_to_noise():
    network = wrapped(EDM())
    found = network.share(torch.tensor([0.0, 1.0, 80.0]))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.5, math.atan(80) / (math.pi / 2)]))


def test_guidance_scale():
    torch.manual_seed(0)
    network = GuidanceScale(Net(), 5, usual=2.0)
    t = torch.rand(3)
    assert network.default(t).tolist() == [2, 2, 2] and network.at(5.0).default(t).tolist() == [5, 5, 5]
    assert network.usual == 2 and network.at(5.0).network is network.network
    twin = copy.deepcopy(network)
    assert twin.network is not network.network


def test_layers_are_found_and_named():
    assert time_layer(Net()) == "time_embed"
    sample = (torch.zeros(2, 3), torch.zeros(2), None)
    assert embedding_width(Net(), sample) == 5
    with pytest.raises(InputError, match="no layer called"):
        time_layer(nn.Linear(2, 2))
    with pytest.raises(UnknownNameError, match="time_embd"):
        TargetTime(Net(), Flow(), 5, "time_embd")
    with pytest.raises(InputError, match="not an embedding of the time"):
        TargetTime(Net(), Flow(), 4)(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(InputError, match="even"):
        GuidanceScale.__mro__[1](Net(), 5, features=3)
