"""Frozen teachers and the cache of their outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from limbeck.blocks.cache import OutputCache
from limbeck.blocks.teachers import Teachers
from limbeck.core.batch import Batch
from limbeck.core.data import MapData, Stream, TensorData
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError, RunError
from limbeck.methods.models import KD
from limbeck.tasks.augment import ShiftFlip

QUIET = EngineConfig(progress=False, device="cpu", log_every=1)


def net(width: int = 6, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(width * 16, 4)
    )


def images(n: int = 24) -> TensorData:
    generator = torch.Generator().manual_seed(0)
    pixels = (torch.rand(n, 1, 6, 6, generator=generator) * 255).to(torch.uint8)
    return TensorData(pixels, torch.arange(n) % 4, augment=ShiftFlip(1))


def test_several_teachers_average_probabilities_and_logits():
    models = [net(seed=s) for s in range(3)]
    x = torch.randn(5, 1, 6, 6)
    said = Teachers(models)(Batch(x))
    each = torch.stack([m.eval()(x) for m in models])
    torch.testing.assert_close(said.probabilities(2.0), torch.softmax(each / 2, -1).mean(0))
    torch.testing.assert_close(said.logits, each.mean(0))
    assert not said.each.requires_grad


def test_a_teacher_is_frozen_stays_in_eval_and_keeps_its_buffers():
    teacher = net()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    method = KD(net(seed=1), teacher, steps=6, batch_size=8, evaluations=0).train()
    assert not teacher.training and method.student.training
    Engine(None, QUIET).run(method, method.stages(images()))
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_own_transforms_and_teacher_inputs():
    x = torch.randn(3, 1, 6, 6)
    plain = net()
    torch.testing.assert_close(Teachers([plain], transforms=[lambda t: 2 * t])(Batch(x)).logits, plain(2 * x))
    torch.testing.assert_close(Teachers(plain)(Batch(x, teacher_inputs=3 * x)).logits, plain(3 * x))
    torch.testing.assert_close(Teachers(lambda t: t.flatten(1)[:, :4])(Batch(x)).logits, x.flatten(1)[:, :4])


def test_features_are_tapped():
    teacher = net()
    x = torch.randn(3, 1, 6, 6)
    said = Teachers([teacher, net(seed=1)], taps=["2"])(Batch(x))
    torch.testing.assert_close(said.features["2"], teacher[:3](x))
    assert set(said.features) == {"2", "1:2"}


@pytest.mark.parametrize("views", [1, 3])
def test_a_cached_run_equals_an_uncached_one(tmp_path: Path, views: int):
    def trained(cached: bool) -> KD:
        method = KD(net(seed=1), net(12), steps=30, batch_size=8, views=views, evaluations=0)
        data = images()
        if cached:
            method.cache_teacher(data, tmp_path)
        Engine(None, QUIET).run(method, method.stages(data))
        return method

    plain, cached = trained(False), trained(True)
    for a, b in zip(plain.student.parameters(), cached.student.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert plain.counters["teacher_forwards"] == 240
    assert cached.counters["teacher_forwards"] == 24 * views
    again = trained(True)
    assert again.counters["teacher_forwards"] == 0


def test_cached_features_come_back(tmp_path: Path):
    data = images()
    teachers = Teachers([net(), net(seed=1)], taps=["0"])
    batch = Stream(data, 8, views=2).batch(0)
    expected = teachers(batch)
    teachers.cache = OutputCache(tmp_path, data, teachers.key())
    for _ in range(2):
        found = teachers(batch)
        torch.testing.assert_close(found.each, expected.each)
        torch.testing.assert_close(found.features["1:0"], expected.features["1:0"])
    assert teachers.cache.hits == 8 + 8  # the second call, and reading back after the first


def test_changed_weights_data_or_taps_name_another_file(tmp_path: Path):
    data, other = images(), images(20)
    a, b = Teachers(net()), Teachers(net())
    assert a.key() == b.key()
    with torch.no_grad():
        b.models[0][4].bias.add_(1e-3)
    folders = {
        OutputCache(tmp_path, d, t.key()).folder for d in (data, other) for t in (a, b, Teachers(net(), taps=["0"]))
    }
    assert len(folders) == 6


def test_the_file_is_plain_safetensors_and_half_precision_is_smaller(tmp_path: Path):
    data = images()
    sizes = {}
    for dtype in ("float32", "float16"):
        teachers = Teachers(net())
        teachers.cache = OutputCache(tmp_path, data, teachers.key(), dtype)
        expected = teachers(Batch(data.fetch(torch.arange(24), 0).inputs)).logits
        teachers(data.fetch(torch.arange(24), 0))
        (file,) = teachers.cache.folder.glob("*.safetensors")
        with safe_open(file, "pt") as stored:
            torch.testing.assert_close(stored.get_tensor("logits")[:, 0].float(), expected, rtol=2e-3, atol=2e-3)
            assert stored.get_tensor("filled").tolist() == [1] * 24
        sizes[dtype] = file.stat().st_size
    assert sizes["float16"] < sizes["float32"]


def test_what_cannot_be_cached_is_refused(tmp_path: Path):
    method = KD(net(seed=1), net())
    with pytest.raises(InputError, match="set views"):
        method.cache_teacher(images(), tmp_path)
    with pytest.raises(InputError, match="can be replayed"):
        OutputCache(tmp_path, MapData([(torch.zeros(1, 6, 6), 0)]), "k")
    with pytest.raises(InputError, match="fingerprint"):
        OutputCache(tmp_path, MapData([(torch.zeros(1, 6, 6), 0)], replayable=True), "k")


def test_a_damaged_cache_is_named(tmp_path: Path):
    data = images()
    teachers = Teachers(net())
    teachers.cache = OutputCache(tmp_path, data, teachers.key())
    teachers.cache.folder.mkdir(parents=True)
    (teachers.cache.folder / "view-0.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0{bad}")
    with pytest.raises(RunError, match="is damaged .* delete it"):
        teachers(data.fetch(torch.arange(2), 0))


def test_bad_teachers_are_named():
    with pytest.raises(InputError, match="at least one teacher"):
        Teachers([])
    with pytest.raises(InputError, match="2 teachers but 1 transforms"):
        Teachers([net(), net()], transforms=[None])
    with pytest.raises(InputError, match=r"number of classes: \[4, 7\]"):
        Teachers([net(), nn.Sequential(nn.Flatten(), nn.Linear(36, 7))])(Batch(torch.zeros(2, 1, 6, 6)))
