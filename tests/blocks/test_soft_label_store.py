"""Labels of views: stored and online labels are the same, mixing, byte counts, damage."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from limbeck.blocks.soft_label_store import LabelWriter, SoftLabelStore, label_bytes, write_labels
from limbeck.blocks.view_labelers import OnlineLabeler, StaticLabeler, ViewPolicy
from limbeck.blocks.views import RandomView
from limbeck.core.errors import InputError, RunError

torch.set_num_threads(1)
N, CLASSES = 12, 4


def images() -> torch.Tensor:
    return torch.randn(N, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def teacher() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, CLASSES)).eval()


def policy(mix: str = "cutmix", jitter: int = 0, seed: int = 5) -> ViewPolicy:
    return ViewPolicy(RandomView((0.35, 1.0), jitter=jitter), mix, seed=seed)


def online(mix: str = "cutmix", jitter: int = 0) -> OnlineLabeler:
    return OnlineLabeler(teacher(), images(), policy(mix, jitter))


@pytest.mark.parametrize(("mix", "jitter"), [("none", 0), ("cutmix", 2), ("mixup", 0)])
def test_the_store_gives_the_views_and_labels_of_the_teacher(tmp_path, mix, jitter):
    labeler = online(mix, jitter)
    store = write_labels(tmp_path, labeler, 7, epochs_per_shard=3, batch_size=5)
    assert len(store) == 7 and sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".json") == [
        f"labels-{k:05d}.safetensors" for k in range(3)
    ]
    for epoch in (0, 4, 6):
        index = torch.randperm(N)[:7]
        views, logits = store.fetch(epoch, index)
        expected, said = labeler.fetch(epoch, index)
        assert torch.equal(views, expected)
        torch.testing.assert_close(logits, said, atol=5e-3, rtol=1e-3)  # float16
        assert logits.dtype == torch.float32


def test_labels_are_the_teachers_on_exactly_these_views(tmp_path):
    store = write_labels(tmp_path, online(), 2)
    views, logits = store.fetch(1, torch.arange(N))
    with torch.no_grad():
        torch.testing.assert_close(teacher()(views).half().float(), logits, atol=2e-3, rtol=1e-3)
    plain, _ = write_labels(tmp_path / "plain", online("none"), 2).fetch(1, torch.arange(N))
    assert not torch.equal(views, plain)


def test_mixing_joins_the_views_of_the_same_epoch():
    index = torch.arange(N)
    alone = policy("none").show(images(), policy("none").plan(3, N), index)
    plan = policy("mixup").plan(3, N)
    share = plan.share[:, None, None, None]
    torch.testing.assert_close(
        policy("mixup").show(images(), plan, index), share * alone + (1 - share) * alone[plan.partner]
    )
    plan = policy("cutmix").plan(3, N)
    mixed = policy("cutmix").show(images(), plan, index)
    own, other = (mixed == alone).all(1), (mixed == alone[plan.partner]).all(1)
    assert (own | other).all() and not own.all()
    assert sorted(plan.partner.tolist()) == list(range(N))


def test_static_labels_mix_as_the_views_do():
    values = torch.randn(N, CLASSES)
    for mix in ("mixup", "cutmix"):
        labeler = StaticLabeler(images(), values, policy(mix))
        plan, index = labeler.plan(3), torch.tensor([4, 0, 9])
        views, labels = labeler.fetch(3, index)
        share = plan.share[index, None]
        torch.testing.assert_close(labels, share * values[index] + (1 - share) * values[plan.partner[index]])
        assert torch.equal(views, policy(mix).show(images(), plan, index))
    plain = StaticLabeler(images(), values, policy("none")).fetch(0, torch.arange(N))[1]
    assert torch.equal(plain, values)
    assert labeler.nbytes == 2 * N * CLASSES
    with pytest.raises(InputError, match=r"need labels of shape \(12, classes\)"):
        StaticLabeler(images(), values[:3], policy())


def test_views_depend_on_seed_and_epoch_alone():
    state = torch.get_rng_state()
    a, b = policy().plan(2, N), policy().plan(2, N)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("views", "partner", "share", "box"))
    assert not torch.equal(a.views, policy().plan(3, N).views)
    assert not torch.equal(a.views, policy(seed=6).plan(2, N).views)
    whole, part = online().fetch(1, torch.arange(N)), online().fetch(1, torch.tensor([7, 2]))
    torch.testing.assert_close(whole[1][[7, 2]], part[1])


def test_bytes_are_those_on_disk(tmp_path):
    for mix, jitter in (("none", 0), ("cutmix", 0), ("mixup", 1)):
        folder = tmp_path / mix
        store = write_labels(folder, online(mix, jitter), 40, epochs_per_shard=20)
        assert store.nbytes == sum(p.stat().st_size for p in folder.iterdir())
        content = label_bytes(40, N, CLASSES, policy(mix, jitter))
        assert content < store.nbytes < content + 3000  # headers of two shards and the description
    assert label_bytes(1, 1, 1000, policy("none")) == 2000 + 17
    assert OnlineLabeler(teacher(), images(), policy()).nbytes == 0


def test_writing_goes_on_where_it_stopped(tmp_path):
    writer = LabelWriter(tmp_path, online(), 5, epochs_per_shard=2, key="a")
    writer.write(0)
    first = (tmp_path / "labels-00000.safetensors").stat().st_mtime_ns
    again = online()
    writer = LabelWriter(tmp_path, again, 5, epochs_per_shard=2, key="a")
    for shard in range(writer.shards):
        writer.write(shard)
    assert (tmp_path / "labels-00000.safetensors").stat().st_mtime_ns == first
    assert again.forwards == 3 * N
    assert len(SoftLabelStore(tmp_path, images()).fetch(4, torch.arange(3))[1]) == 3
    with pytest.raises(RunError, match="holds other labels"):
        LabelWriter(tmp_path, online(), 5, epochs_per_shard=2, key="b")


def test_what_is_wrong_is_said(tmp_path):
    store = write_labels(tmp_path, online(), 2)
    with pytest.raises(InputError, match="epoch 2 has no stored labels: the store holds 2"):
        store.fetch(2, torch.arange(1))
    with pytest.raises(RunError, match="belong to other images"):
        SoftLabelStore(tmp_path, images() + 1)
    with pytest.raises(RunError, match="does not exist"):
        SoftLabelStore(tmp_path / "nowhere", images())
    (tmp_path / "labels-00000.safetensors").write_bytes(b"x")
    with pytest.raises(RunError, match="missing or damaged"):
        SoftLabelStore(tmp_path, images()).fetch(0, torch.arange(1))
    about = json.loads((tmp_path / "labels.json").read_text())
    (tmp_path / "labels.json").write_text(json.dumps({**about, "format": 99}))
    with pytest.raises(RunError, match="no label store of the format"):
        SoftLabelStore(tmp_path, images())
    with pytest.raises(InputError, match="training mode"):
        OnlineLabeler(teacher().train(), images(), policy())
    with pytest.raises(InputError, match="images must have the shape"):
        OnlineLabeler(teacher(), images()[:0], policy())
    with pytest.raises(InputError, match="unknown mixing"):
        ViewPolicy(RandomView(), "cut")
    with pytest.raises(InputError, match="alpha of the mixing"):
        ViewPolicy(RandomView(), "mixup", alpha=0)
    with pytest.raises(InputError, match="at least one of each"):
        LabelWriter(tmp_path / "b", online(), 0)


def test_infinite_logits_are_not_stored(tmp_path):
    loud = OnlineLabeler(lambda x: torch.full((len(x), CLASSES), 1e6), images(), policy())
    with pytest.raises(RunError, match="do not fit into float16"):
        write_labels(tmp_path, loud, 1)
