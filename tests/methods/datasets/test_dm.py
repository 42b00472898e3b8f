import copy

import numpy as np
import pytest
import torch
from torch import nn

import limbeck
from limbeck import networks
from limbeck.core.batch import Batch
from limbeck.core.data import TensorData
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError, UnknownNameError
from limbeck.methods.datasets import DM
from tests.helpers import resumed_equals_uninterrupted

torch.set_num_threads(1)


def build():
    return networks.build("convnet-w4-d2", in_shape=(1, 8, 8), num_classes=3)


def real(n=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    return torch.randn(n, 1, 8, 8, generator=generator) + y[:, None, None, None], y


def make(**settings):
    return DM(real(), build, **{"ipc": 2, "batch_real": 4, "steps": 12, "diffaug": "none", **settings})


def test_loss_against_numpy():
    method = make()
    torch.manual_seed(7)
    loss = method(Batch(*real(12, 1)))
    torch.manual_seed(7)
    method.augment.draw(3)  # the draw comes before the network
    network = method.fresh_network()
    x, y = real(12, 1)
    wanted, found = network.embed(x).numpy(), network.embed(method.images).detach().numpy()
    expected = sum(
        ((wanted[y.numpy() == c].mean(0) - found[method.labels.numpy() == c].mean(0)) ** 2).sum() for c in range(3)
    )
    assert np.isclose(loss.item(), expected, rtol=1e-5)


def test_a_network_without_embed_is_tapped_at_its_last_linear_layer():
    def plain():
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 3))

    method = DM(real(), plain, ipc=2, diffaug="none")
    torch.manual_seed(1)
    loss = method(Batch(*real(12, 1)))
    torch.manual_seed(1)
    method.augment.draw(3)
    network = method.fresh_network()[:-1]
    x, y = real(12, 1)
    means = [
        torch.stack([f[t == c].mean(0) for c in range(3)])
        for f, t in ((network(x), y), (network(method.images), method.labels))
    ]
    assert torch.isclose(loss, (means[0] - means[1]).square().sum())


def test_gradient_goes_to_the_images_alone_and_networks_are_fresh():
    method = make(diffaug="color_crop_cutout_flip_scale_rotate")
    batch = Batch(*real(12, 1))
    method(batch).backward()
    assert method.images.grad is not None and float(method.images.grad.abs().sum()) > 0
    assert [name for name, _ in method.named_parameters()] == ["images"]
    values = {round(method(batch).item(), 6) for _ in range(4)}
    assert len(values) == 4  # another network, another loss


def test_siamese_augmentation_is_one_draw_for_each_class():
    method = make(diffaug="crop")
    images, labels = method.images.detach(), method.labels
    real_x, _, own_x, _ = method.views(Batch(images.clone(), labels.clone()))
    assert torch.equal(real_x, own_x)


def test_equal_sets_have_no_loss():
    method = make(diffaug="color_crop_cutout_flip_scale_rotate")
    assert method(Batch(method.images.detach().clone(), method.labels)).item() < 1e-9


def test_classes_that_a_batch_lacks_do_not_count():
    method = make()
    x, y = real(12, 1)
    loss = method(Batch(x[y < 2], y[y < 2]))
    loss.backward()
    assert torch.equal(method.images.grad[method.labels == 2], torch.zeros(2, 1, 8, 8))


def test_starts_from_real_images_of_the_class():
    method = make()
    x, y = real()
    for image, label in zip(method.images.detach(), method.labels, strict=True):
        same = (x == image).flatten(1).all(1)
        assert bool(same.any()) and int(y[same][0]) == int(label)
    assert make(init="noise").images.shape == (6, 1, 8, 8)
    for label in range(3):  # a representative start is nearer to the class mean than random ones
        mean = x[y == label].mean(0)
        near, far = (
            (m.images.detach()[m.labels == label].mean(0) - mean).norm() for m in (make(init="herding"), method)
        )
        assert near < far
    assert torch.equal(make().images, make().images)


def test_multi_formation_holds_more_images_in_as_many_bytes():
    method = make(factor=2)
    images, labels = method.present()
    assert images.shape == (24, 1, 8, 8) and torch.bincount(labels).tolist() == [8, 8, 8]
    made = method.distilled()
    assert made.factor == 2 and made.nbytes == make().distilled().nbytes
    with pytest.raises(InputError, match="cannot be cut into 3x3"):
        make(factor=3)


def test_zca_whitens_and_is_paid_for():
    method = make(zca=True)
    plain = make()
    assert method.distilled().nbytes == plain.distilled().nbytes + method.zca.nbytes
    contestants = method.contestants()  # all are trained on whitened images, so it counts for each of them
    assert len(contestants["random, same bytes"]) == len(contestants["distilled"])
    assert contestants["whole set"].nbytes == plain.contestants()["whole set"].nbytes + method.zca.nbytes
    x, _ = method.prepared_test(TensorData(*real()))
    flat = x.flatten(1)
    assert float(flat.mean(0).abs().max()) < 1e-4


def test_resumes_exactly(tmp_path):
    resumed_equals_uninterrupted(lambda: make(diffaug="color_crop"), None, tmp_path, stops=(4, 9), every=3)


def test_fit_judges_and_saves(tmp_path):
    x, y = real(60)
    run = limbeck.fit(
        "dm",
        (x, y),
        test=real(30, 5),
        student=build,
        out=tmp_path / "run",
        ipc=2,
        batch_real=4,
        steps=5,
        judge_steps=5,
        judge_seeds=2,
        engine={"progress": False},
    )
    assert [r["who"] for r in run.result["rows"]] == ["distilled", "random, same bytes", "whole set"]
    found = limbeck.load(tmp_path / "run").content
    assert torch.allclose(found.inputs, run.method.distilled().inputs, atol=1e-6)
    assert found.hard_labels.tolist() == [0, 0, 1, 1, 2, 2]
    rows = {r["who"]: r for r in run.result["rows"]}
    assert rows["random, same bytes"]["bytes"] <= rows["distilled"]["bytes"]


def test_a_module_stands_for_its_architecture():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    before = network[1].weight.clone()
    method = DM(real(), network, ipc=1)
    assert torch.equal(network[1].weight, before)
    assert not torch.equal(method.fresh_network()[1].weight, method.fresh_network()[1].weight)


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        ((torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long)), {}, "data set is empty"),
        ((torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)), {}, "one class only"),
        ((torch.zeros(4, 1, 8, 8), torch.tensor([0.0, 1, 0, 1])), {}, "needs one integer class"),
        ((torch.zeros(4, 64), torch.tensor([0, 1, 0, 1])), {"ipc": 1}, "distils images"),
        (real(), {"ipc": 11}, "ipc 11 is more than the 10 samples of class 0"),
    ],
)
def test_bad_data(data, settings, message):
    with pytest.raises(InputError, match=message):
        DM(data, build, **settings)


def test_bad_networks():
    with pytest.raises(InputError, match="must be a module or a function"):
        DM(real(), "convnet", ipc=1)
    with pytest.raises(InputError, match="no linear layer"):
        DM(real(), lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()), ipc=1)(Batch(*real(12)))
    with pytest.raises(InputError, match="needs student="):
        limbeck.fit("dm", real(), ipc=1)


def test_unknown_judges_are_refused_before_distilling():
    with pytest.raises(UnknownNameError, match="unknown network 'nothing'"):
        make(judge_networks=("nothing",))


def test_a_whole_set_that_does_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr("limbeck.methods.datasets.base.MOST_BYTES", 100)
    with pytest.warns(UserWarning, match="no network is trained on it"):
        assert list(make().contestants()) == ["distilled", "random, same bytes"]
    assert "whole set" not in make(judge_whole=False).contestants()


def test_groups_of_classes_add_up_to_the_whole_step():
    fixed = build()

    def stepped(groups):
        method = make(accumulate=groups, steps=1)
        method.factory = lambda: copy.deepcopy(fixed)  # the same network for every group
        Engine(None, EngineConfig(progress=False), seed=1).run(method, method.stages(None, seed=0))
        return method.images.detach()

    whole, parts = stepped(1), stepped(3)
    assert not torch.equal(whole, make().images)
    assert torch.allclose(whole, parts, atol=1e-5)
