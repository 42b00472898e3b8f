from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from limbeck.blocks.encoders import Encoder, RawInput, feature_width, pooled
from limbeck.core.errors import InputError
from limbeck.networks import build


@pytest.fixture(autouse=True)
def _quiet() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Tokens(nn.Module):
    """A model with an embedding layer called ``embed``, which is not asked for features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"hidden": self.embed(ids), "other": ids}


def test_pooling_of_maps_and_tokens():
    maps, tokens = torch.randn(2, 3, 4, 5), torch.randn(2, 6, 3)
    torch.testing.assert_close(pooled(maps), maps.mean((2, 3)))
    torch.testing.assert_close(pooled(tokens), tokens.mean(1))
    assert pooled(maps, "flatten").shape == (2, 60) and pooled(tokens, "flatten").shape == (2, 18)
    torch.testing.assert_close(pooled((maps, tokens)), maps.mean((2, 3)))
    rows = torch.randn(2, 3)
    assert pooled(rows) is rows
    for bad in (torch.randn(3), {"a": "text"}):
        with pytest.raises(InputError, match="must give features"):
            pooled(bad)


def test_own_networks_are_asked_for_their_embedding():
    net = build("cnn-w4-s2", in_shape=(1, 8, 8), num_classes=3).eval()
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(Encoder(net)(x), net.embed(x))
    ids = torch.randint(9, (2, 5))
    model = Tokens()
    torch.testing.assert_close(Encoder(model)(ids), model.embed(ids).mean(1))
    assert Encoder(model)(ids=ids).shape == (2, 4)


def test_the_width_is_found_without_side_effects():
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5)).train()
    net[1].eval()
    before, state = net[1].running_mean.clone(), torch.get_rng_state()
    x = torch.randn(2, 1, 8, 8)
    state = torch.get_rng_state()
    assert feature_width(net, x) == 6 and feature_width(net, x, "flatten") == 6 * 36
    assert torch.equal(net[1].running_mean, before) and torch.equal(torch.get_rng_state(), state)
    assert net.training and net[0].training and not net[1].training
    assert feature_width(build("vgg-w4-s2", in_shape=(1, 8, 8), num_classes=3)) == 8
    with pytest.raises(InputError, match="give sample"):
        feature_width(net)


def test_the_raw_input_is_flat():
    x = torch.randn(3, 1, 4, 4)
    torch.testing.assert_close(RawInput()(x), x.flatten(1))
    assert RawInput()(images=torch.zeros(2, 3, dtype=torch.int64)).dtype == torch.float32
    with pytest.raises(InputError, match="no tensor"):
        RawInput()("text")
