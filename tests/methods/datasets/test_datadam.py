import numpy as np
import pytest
import torch
from torch import nn

from limbeck import networks
from limbeck.core.batch import Batch
from limbeck.core.errors import InputError
from limbeck.losses.features import attention_map
from limbeck.methods.datasets import DM, DataDAM
from tests.helpers import resumed_equals_uninterrupted

torch.set_num_threads(1)


def build():
    return networks.build("convnet-w4-d3", in_shape=(1, 8, 8), num_classes=3)


def real(n=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    return torch.randn(n, 1, 8, 8, generator=generator) + y[:, None, None, None], y


def make(cls=DataDAM, **settings):
    return cls(real(), build, **{"ipc": 2, "batch_real": 4, "steps": 12, "diffaug": "none", **settings})


@pytest.mark.parametrize("power", [1.0, 4.0])
def test_loss_against_numpy(power):
    method = make(power=power, lambda_mmd=0.3)
    torch.manual_seed(7)
    losses = method.losses(Batch(*real(12, 1)))
    torch.manual_seed(7)
    method.augment.draw(3)
    network = method.fresh_network()

    def seen(x, labels):
        maps = []
        for block in network.blocks:
            x = block[2](block[1](block[0](x)))  # convolution, norm, activation
            a = (np.abs(x.detach().numpy()) ** power).sum(1).reshape(len(x), -1)
            maps.append(a / np.linalg.norm(a, axis=1, keepdims=True))
            x = block[3](x)
        features = [*maps[:-1], x.detach().flatten(1).numpy()]  # the last attention map is not matched
        return [np.stack([f[labels == c].mean(0) for c in range(3)]) for f in features]

    x, y = real(12, 1)
    wanted, found = seen(x, y.numpy()), seen(method.images, method.labels.numpy())
    each = [((a - b) ** 2).sum() for a, b in zip(wanted, found, strict=True)]
    assert np.isclose(losses["attention"].item(), sum(each[:-1]), rtol=1e-4)
    assert np.isclose(losses["features"].item(), each[-1], rtol=1e-4)
    assert np.isclose(losses.total.item(), 100 * (sum(each[:-1]) + 0.3 * each[-1]), rtol=1e-4)


def test_attention_of_a_constant_map_and_of_scaled_features():
    assert torch.allclose(attention_map(torch.full((2, 3, 4, 4), 0.7), 4.0), torch.full((2, 16), 0.25))
    features = torch.rand(2, 3, 4, 4)
    for power in (1.0, 2.0, 4.0):
        assert torch.allclose(attention_map(3 * features, power), attention_map(features, power), atol=1e-6)


def test_without_attention_it_is_distribution_matching():
    batch = Batch(*real(12, 1))
    torch.manual_seed(3)
    dam = make().losses(batch)["features"]
    torch.manual_seed(3)
    assert torch.allclose(dam, make(DM)(batch))


def test_gradient_goes_to_the_images_alone():
    method = make(diffaug="color_crop_cutout_flip_scale_rotate")
    method(Batch(*real(12, 1))).backward()
    assert [name for name, _ in method.named_parameters()] == ["images"]
    assert float(method.images.grad.abs().sum()) > 0


def test_lambda_zero_matches_attention_alone():
    assert set(make(lambda_mmd=0.0).losses(Batch(*real(12, 1)))) == {"attention"}


def test_in_place_activations_do_not_spoil_what_is_tapped():
    def network(inplace):
        torch.manual_seed(0)
        conv = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace), nn.Conv2d(4, 4, 3), nn.ReLU(inplace)]
        return nn.Sequential(*conv, nn.Flatten(), nn.Linear(64, 3))

    batch = Batch(*real(12, 1))
    values = [DataDAM(real(), lambda i=i: network(i), ipc=1, diffaug="none")(batch).item() for i in (False, True)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_named_taps_and_networks_without_activations():
    x = Batch(*real(12, 1))
    assert make(taps=("blocks.0", "blocks.1")).losses(x)["attention"].item() > 0
    with pytest.raises(InputError, match="no activation modules"):
        DataDAM(real(), lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), ipc=1)(x)
    one = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))
    with pytest.raises(InputError, match="only one activation"):
        DataDAM(real(), one, ipc=1)(x)


def test_resumes_exactly(tmp_path):
    resumed_equals_uninterrupted(lambda: make(diffaug="crop"), None, tmp_path, stops=(4, 9), every=3)
