import pytest
import torch

import limbeck
from limbeck import networks
from limbeck.core.batch import Batch
from limbeck.core.errors import InputError
from limbeck.methods.datasets import DM, FYI, DataDAM
from limbeck.methods.datasets.fyi import host_of, left_right_similarity
from tests.helpers import resumed_equals_uninterrupted

torch.set_num_threads(1)


def build():
    return networks.build("convnet-w4-d2", in_shape=(1, 8, 8), num_classes=3)


def real(n=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    return torch.randn(n, 1, 8, 8, generator=generator) + y[:, None, None, None], y


def host(cls=DM, **settings):
    return cls(real(), build, **{"ipc": 2, "batch_real": 4, "steps": 12, "diffaug": "none", **settings})


@pytest.mark.parametrize("cls", [DM, DataDAM])
def test_the_host_sees_images_and_mirror_images(cls):
    method, doubled = FYI(host(cls)), host(cls, ipc=4)
    batch = Batch(*real(12, 1))
    with torch.no_grad():  # by hand: a host that stores both
        for c in range(3):
            own = method.host.images[method.host.labels == c]
            doubled.images[doubled.labels == c] = torch.cat([own, own.flip(-1)])
    torch.manual_seed(5)
    found = method(batch)
    torch.manual_seed(5)
    expected = doubled(batch)
    assert torch.allclose(found, expected, rtol=1e-5)
    found.backward()
    expected.backward()
    for c in range(3):
        first, second = doubled.images.grad[doubled.labels == c].split(2)
        assert torch.allclose(method.host.images.grad[method.host.labels == c], first + second.flip(-1), atol=1e-6)


def test_stores_no_mirror_images():
    made = FYI(host()).distilled()
    assert len(made) == 6 and made.nbytes == host().distilled().nbytes


def test_symmetric_images_gain_nothing():
    plain = host()
    with torch.no_grad():
        plain.images.copy_((plain.images + plain.images.flip(-1)) / 2)
    batch = Batch(*real(12, 1))
    torch.manual_seed(2)
    alone = plain(batch)
    torch.manual_seed(2)
    assert torch.allclose(FYI(plain)(batch), alone, rtol=1e-5)


def test_left_right_similarity():
    image = torch.randn(4, 1, 6, 6)
    assert torch.allclose(left_right_similarity((image + image.flip(-1)) / 2), torch.ones(4), atol=1e-5)
    assert torch.allclose(left_right_similarity((image - image.flip(-1)) / 2), -torch.ones(4), atol=1e-5)


def test_resumes_exactly(tmp_path):
    resumed_equals_uninterrupted(lambda: FYI(host(DataDAM)), None, tmp_path, stops=(4, 9), every=3)


def test_fit_with_a_named_host(tmp_path):
    run = limbeck.fit(
        "fyi",
        real(60),
        test=real(30, 3),
        student=build,
        out=tmp_path / "run",
        host="datadam",
        ipc=1,
        settings=("steps=4", "batch_real=3", "judge_steps=4", "judge_seeds=1", "power=2"),
        engine={"progress": False},
    )
    assert isinstance(run.method.host, DataDAM) and run.method.host.config.power == 2
    assert "left_right_similarity" in run.result
    assert len(limbeck.load(tmp_path / "run").content) == 3


def test_bad_hosts():
    with pytest.raises(InputError, match="not into 'kd'"):
        host_of(FYI.Config.make(host="kd"))
    with pytest.raises(InputError, match="not into FYI"):
        FYI(FYI(host()))
    with pytest.raises(InputError, match="pairs name=value"):
        FYI.Config.make(settings=("steps",))
    with pytest.raises(InputError, match="unknown setting stepz"):
        host_of(FYI.Config.make(settings=("stepz=3",)))
    with pytest.raises(InputError, match="steps must be"):
        host_of(FYI.Config.make(settings=("steps=0",)))
