"""Grad-CAM against a head whose gradient is known, on maps and on tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from limbeck import networks
from limbeck.blocks.gradcam import grad_cam, importance_maps, last_map, resize_maps
from limbeck.core.errors import InputError

torch.set_num_threads(1)


class Averaged(nn.Module):
    """Maps, their mean over positions, a linear head: α_k is the head's weight over the number of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.fc = nn.Linear(5, 3)
        self.unused = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        return self.fc(self.act(self.conv(x)).mean((2, 3)))


def model() -> Averaged:
    torch.manual_seed(0)
    return Averaged()


def images(n: int = 4, side: int = 8) -> Tensor:
    return torch.randn(n, 1, side, side, generator=torch.Generator().manual_seed(1))


def test_class_activation_maps_of_a_mean_pooled_network():
    net, x = model(), images()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    maps = net.conv(x).relu()
    for classes in (None, torch.tensor([0, 1, 2, 0])):
        chosen = net(x).argmax(1) if classes is None else classes
        raw = torch.einsum("bk,bkhw->bhw", net.fc.weight[chosen], maps).clamp_min(0)
        top = raw.amax((1, 2), keepdim=True)
        found = grad_cam(net, x, "act", classes=classes)
        torch.testing.assert_close(found, torch.where(top > 0, raw / top.clamp_min(1e-30), 0.0))
    assert net.training and not found.requires_grad and not x.requires_grad
    assert all(p.grad is None for p in net.parameters())


def test_a_map_without_evidence_is_zero_not_nan():
    net = model()
    with torch.no_grad():
        net.fc.weight.fill_(-1.0)
    assert grad_cam(net, images(), "act").abs().sum() == 0


def test_samples_do_not_depend_on_each_other():
    torch.manual_seed(0)
    net = networks.build("convnet-w4-d2-batch", in_shape=(1, 8, 8), num_classes=3)
    x = images()
    torch.testing.assert_close(grad_cam(net, x, "blocks.0")[:1], grad_cam(net, x[:1], "blocks.0"))


def test_tokens_are_put_on_their_grid():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(1, 4, 2, stride=2)
            self.norm = nn.Identity()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.embed(x).flatten(2).transpose(1, 2)
            tokens = self.norm(torch.cat([tokens.mean(1, keepdim=True), tokens], 1))
            return self.fc(tokens[:, 1:].mean(1))

    torch.manual_seed(0)
    net, x = Tokens(), images()
    found = grad_cam(net, x, "norm", grid=(4, 4))
    maps = net.embed(x)
    raw = torch.einsum("bk,bkhw->bhw", net.fc.weight[net(x).argmax(1)], maps).clamp_min(0)
    torch.testing.assert_close(found, raw / raw.amax((1, 2), keepdim=True))
    torch.testing.assert_close(grad_cam(net, x, "norm", prefix_tokens=1), found)
    with pytest.raises(InputError, match="17 tokens are no grid of 5x5"):
        grad_cam(net, x, "norm", grid=(5, 5))


def test_resizing_keeps_the_place_of_what_matters():
    maps = torch.zeros(2, 8, 8)
    maps[0, 0:2, 6:8] = 1.0
    maps[1] = 0.5
    small = resize_maps(maps, (4, 4))
    assert small.shape == (2, 4, 4) and int(small[0].argmax()) == 3
    torch.testing.assert_close(small[1], torch.full((4, 4), 0.5))
    assert resize_maps(maps, (16, 16)).shape == (2, 16, 16)


def test_importance_of_a_data_set():
    torch.manual_seed(0)
    net, x = networks.build("convnet-w4-d3", in_shape=(1, 8, 8), num_classes=3), images(7)
    path = last_map(net, x[:1])
    assert path.startswith("blocks.2") and path != "blocks.2"  # the pooled map has one position, and so is of no use
    found = importance_maps(net, x, None, (4, 4), batch_size=3)
    torch.testing.assert_close(found, resize_maps(grad_cam(net, x, path), (4, 4)))
    assert found.min() >= 0 and found.max() <= 1
    vit = networks.build("vit-d16-l4-h2-p2", in_shape=(1, 8, 8), num_classes=3)
    assert last_map(vit, x[:1]) == vit.stage_paths[-2]
    assert importance_maps(vit, x, None, (4, 4)).shape == (7, 4, 4)


def test_bad_layers_are_named():
    net, x = model(), images()
    with pytest.raises(InputError, match="'unused' has no influence"):
        grad_cam(net, x, "unused")
    with pytest.raises(InputError, match="needs maps"):
        grad_cam(net, x, "fc")
    with pytest.raises(InputError, match="no layer of Linear gives maps"):
        last_map(nn.Linear(4, 2), torch.zeros(1, 4))
