"""The family's contract: what comes in, batches, stores, contestants, what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import limbeck
from limbeck.core.batch import Batch, Losses
from limbeck.core.data import Data, TensorData
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError
from limbeck.core.stage import Stage
from limbeck.diffusion.conditions import Conditions
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.losses import denoising_loss
from limbeck.diffusion.oracles import gaussian_mixture
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.schedules import Flow, VPDiscrete
from limbeck.methods.samplers.base import SamplerDistiller, conditions_of
from limbeck.networks.diffusion_mlp import DiffusionMLP

torch.set_num_threads(1)
LABELS = torch.arange(3).repeat(8)


class Plain(SamplerDistiller):
    """Trains the student on samples."""

    name = "plain"
    needs_images = True

    def losses(self, batch: Batch) -> Losses:
        x0, cond = self.unpack(batch)
        assert x0 is not None
        return Losses(mse=denoising_loss(self.student, x0, torch.rand(len(x0)), cond, space="flow"))

    def stages(self, train: Data | None = None, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        first, stream, state = self.samples_of(train, seed)
        main = Stage(
            "main",
            4,
            stream,
            losses=self.losses,
            optimisers=lambda: self.optimised(4),
            after_step=self.follow,
            state=state,
        )
        return [*first, main]

    def sampler(self) -> Sampler:
        return Sampler.ode(self.averaged, 2)


class ImageFree(Plain):
    needs_images = False


def teacher(classes: int | None = 3) -> Denoiser:
    torch.manual_seed(0)
    network = DiffusionMLP((2,), width=8, blocks=1, num_classes=classes)
    torch.nn.init.normal_(network.last.weight)
    return Denoiser(network, Flow(), "flow", null_cond=None if classes is None else torch.tensor(classes))


def plain(cls: Any = Plain, **settings: Any) -> Any:
    return cls(teacher(), LABELS, **{"batch_size": 8, "pairs": 20, "judge_count": 20, "teacher_nfe": 4, **settings})


def test_batches_of_every_kind_are_read() -> None:
    method, x = plain(), torch.randn(5, 2)
    for batch in (Batch(x, LABELS[:5]), Batch({"x0": x, "cond": LABELS[:5]})):
        found, cond = method.unpack(batch)
        assert torch.equal(found, x) and torch.equal(cond, LABELS[:5])
    found, cond = method.unpack(Batch({"x0": x}))
    assert cond is None
    free = plain(ImageFree)
    assert torch.equal(free.unpack(Batch(LABELS[:5]))[1], LABELS[:5])
    assert torch.equal(free.unpack(Batch({"cond": LABELS[:5]}))[1], LABELS[:5])
    assert free.unpack(Batch({"number": torch.arange(5)})) == (None, None)
    with pytest.raises(InputError, match="needs samples"):
        method.unpack(Batch({"cond": LABELS[:5]}))
    with pytest.raises(InputError, match=r"shape \(2,\), the data has \(3,\)"):
        method.unpack(Batch(torch.randn(4, 3), LABELS[:4]))


def test_labels_are_left_out_where_the_teacher_takes_none() -> None:
    method = Plain(teacher(None), None)
    assert method.unpack(Batch(torch.randn(3, 2), LABELS[:3]))[1] is None


def test_own_samples_are_learned_from_and_the_teachers_where_there_are_none() -> None:
    method = plain()
    assert [s.name for s in method.stages(TensorData(torch.randn(30, 2), LABELS.repeat(2)[:30]))] == ["main"]
    stages = method.stages(Conditions(LABELS))
    assert [s.name for s in stages] == ["samples", "main"]
    Engine(None, EngineConfig(progress=False), seed=0).run(method, stages)
    store = stages[0].state["pairs"]
    assert store.done == 20 and method.counters["pairs_made"] == 20
    wanted = method.teacher_sampler().sample(store.z, store.cond).x
    assert torch.allclose(store.x, wanted, atol=1e-5)


def test_the_teacher_stays_and_the_average_follows() -> None:
    method = plain()
    before = {k: v.clone() for k, v in method.teacher.state_dict().items()}
    data = TensorData(torch.randn(30, 2), LABELS.repeat(2)[:30])
    Engine(None, EngineConfig(progress=False), seed=0).run(method, method.stages(data))
    for name, value in method.teacher.state_dict().items():
        assert torch.equal(value, before[name])
    student, average = method.student.module.first.weight, method.averaged.module.first.weight
    assert not torch.equal(student, before["module.first.weight"]) and not torch.equal(student, average)
    assert not any(k.startswith("teacher") for k in method.training_state()["tensors"])


def test_contestants_stand_at_equal_evaluations() -> None:
    found = plain(guidance=1.0).contestants()
    assert {k: s.nfe for k, s in found.items()} == {"student": 2, "teacher, 2 steps": 2, "teacher, 4 steps": 4}
    guided = plain(guidance=2.0).contestants()
    assert {k: s.nfe for k, s in guided.items()} == {"student": 2, "teacher, 1 step": 2, "teacher, 4 steps": 8}


def test_a_run_on_own_objects_is_judged_and_kept(tmp_path: Path) -> None:
    law = gaussian_mixture(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), 0.2, labels=torch.arange(3))
    x, y = law.sample(60, torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"batch_size": 8, "judge_count": 40, "teacher_nfe": 4}
    run = limbeck.fit(
        Plain, (x, y), teacher=teacher(), test=(x, y), out=tmp_path / "run", engine={"progress": False}, **settings
    )
    rows = run.result["rows"]
    assert [r["who"] for r in rows] == ["student", "teacher, 2 steps", "teacher, 4 steps"]
    assert rows[0]["nfe"] == 2 and "sliced_wasserstein" in rows[0] and rows[2]["paired_mse"] < rows[0]["paired_mse"]
    assert run.result["pictures"]
    again = limbeck.load(tmp_path / "run").content
    z = torch.randn(5, 2)
    mine = run.method.eval().sampler()
    assert torch.equal(again.sample(z, y[:5]).x, mine.sample(z, y[:5]).x)


def test_conditions_in_what_users_give() -> None:
    assert torch.equal(conditions_of(TensorData(LABELS)).values, LABELS)
    assert torch.equal(conditions_of(TensorData(torch.randn(24, 2), LABELS)).values, LABELS)
    assert conditions_of(TensorData(torch.randn(24, 2))).values is None


def test_mistakes() -> None:
    with pytest.raises(InputError, match="must be a Denoiser or a loaded pipeline"):
        Plain(torch.nn.Linear(2, 2), LABELS)
    with pytest.raises(InputError, match="shape of a sample is not known"):
        Plain(Denoiser(torch.nn.Linear(2, 2), Flow(), "flow"))
    with pytest.raises(InputError, match="needs teacher="):
        limbeck.fit(Plain, (torch.randn(4, 2), LABELS[:4]))

    class Broken(torch.nn.Module):
        shape = (2,)

        def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
            return x * torch.nan

    with pytest.raises(InputError, match="the teacher's prediction is not finite"):
        Plain(Denoiser(Broken(), VPDiscrete(), "eps"), None).check(Batch(torch.randn(4, 2)))
