"""Greedy k-centre as a method, and what selections by embeddings share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import limbeck
from limbeck.blocks import coresets
from limbeck.blocks.embeddings import embed, gradient_embedding, raw_pixels
from limbeck.core.errors import InputError
from limbeck.methods.datasets.k_center import KCenter
from tests.helpers import resumed_equals_uninterrupted
from tests.methods.datasets.selections import SHORT, build, data, encoder, images


def test_each_class_is_covered_by_itself():
    x, y = images()
    made = KCenter((x, y), ipc=5).select()
    flat = x.flatten(1)
    for c in range(3):
        ids = (y == c).nonzero().flatten()
        expected = ids[coresets.k_center(flat[ids], 5)]
        assert torch.equal(made.index[made.labels == c], expected)
        radius = coresets.covering_radius(flat[ids], coresets.k_center(flat[ids], 5))
        draws = torch.rand(20, 20, generator=torch.Generator().manual_seed(c)).argsort(1)[:, :5]
        chance = [coresets.covering_radius(flat[ids], draw) for draw in draws]
        assert radius < sum(chance) / 20


def test_larger_selections_contain_smaller_ones():
    small, large = (set(KCenter(images(), ipc=k).select().index.tolist()) for k in (3, 8))
    assert small < large


def test_random_starts_depend_on_the_seed():
    starts = [KCenter(images(), ipc=1, first="random", seed=s).select().index.tolist() for s in range(4)]
    assert len({tuple(s) for s in starts}) > 1
    assert starts[0] == KCenter(images(), ipc=1, first="random", seed=0).select().index.tolist()
    medoids = [KCenter(images(), ipc=1, seed=s).select().index.tolist() for s in range(2)]
    assert medoids[0] == medoids[1]


class Foreign(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh())
        self.fc = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x))


def test_what_samples_are_compared_by():
    x, y = images()
    net = encoder()
    own = KCenter((x, y), build, net, ipc=2)
    torch.testing.assert_close(own.embeddings(), net.embed(x).detach())
    assert own.embeddings() is own.embeddings()
    layer = KCenter((x, y), encoder=net, layer="blocks.0", ipc=2)
    torch.testing.assert_close(layer.embeddings(), embed(net, x, layer="blocks.0"))
    gradients = KCenter((x, y), encoder=net, embedding="gradients", double_softmax=True, ipc=2)
    torch.testing.assert_close(gradients.embeddings(), gradient_embedding(net, (x, y), double_softmax=True))
    pixels = KCenter((x, y), encoder=net, embedding="pixels", ipc=2)
    torch.testing.assert_close(pixels.embeddings(), raw_pixels(x))
    torch.testing.assert_close(pixels.embed(x[:5]), raw_pixels(x)[:5])  # others are centred alike
    torch.manual_seed(0)
    foreign = Foreign()
    torch.testing.assert_close(KCenter((x, y), encoder=foreign, ipc=2).embeddings(), foreign.body(x).detach())
    headless = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))  # five features, and not three logits
    torch.testing.assert_close(KCenter((x, y), encoder=headless, ipc=2).embeddings(), headless(x).detach())
    given = KCenter((x, y), ipc=2, embeddings=y[:, None].float())
    assert given.embeddings().shape == (60, 1)
    assert not any(p.requires_grad for p in net.parameters()) and list(own.trainable_parameters()) == []


def test_bad_input_is_named():
    for options, line in (
        ({"embedding": "features"}, "needs encoder="),
        ({"encoder": "resnet"}, "must be an nn.Module, not str"),
        ({"embeddings": torch.zeros(3, 2)}, "60 samples, embeddings"),
        ({"embedding": "colour"}, "embedding must be"),
    ):
        with pytest.raises(InputError, match=line):
            KCenter(images(), ipc=2, **options)


def test_runs_on_data_of_ones_own_and_on_a_task(tmp_path, monkeypatch):
    run = limbeck.fit(
        KCenter, data(), student=build, teacher=encoder(), test=data(30), ipc=2, engine={"progress": False}, **SHORT
    )
    assert run.method.encoder is not None and len(run.method.distilled()) == 6
    assert {"distilled", "random, same bytes", "whole set"} == {row["who"] for row in run.result["rows"]}
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path))
    run = limbeck.fit(KCenter, task="wine", embedding="pixels", ipc=2, engine={"progress": False}, **SHORT)
    assert run.method.encoder is None and run.method.distilled().kind == "vectors"


def test_a_task_trains_its_encoder_on_training_data_alone(monkeypatch):
    from limbeck.methods.datasets import selection_base
    from limbeck.tasks.base import TaskConfig, load_task

    asked = []

    def trained(task, name, **options):
        asked.append((task.fingerprint, name, options["epochs"]))
        return torch.nn.Sequential(nn.Linear(13, 4), nn.ReLU(), nn.Linear(4, 3))

    monkeypatch.setattr(selection_base, "reference_teacher", trained)
    task = load_task(TaskConfig.make(task="wine"))
    setup = KCenter.Setup.make(task="wine", encoder="mlp-4", encoder_epochs=2)
    method = KCenter.on_task(task, setup, KCenter.Config.make(ipc=2))
    assert asked == [(task.fingerprint, "mlp-4", 2)] and method.embeddings().shape == (len(task.train), 4)


def test_resume_is_exact(tmp_path):
    method = resumed_equals_uninterrupted(
        lambda: KCenter(images(), build, encoder(), ipc=3), images(), tmp_path, stops=(1, 2), every=1
    )
    assert torch.equal(method.chosen, KCenter(images(), build, encoder(), ipc=3).select().index)
