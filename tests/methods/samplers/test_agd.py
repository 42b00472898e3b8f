"""AGD: adapters on the teacher's own network learn guidance; the base stays, one evaluation a step, and only adapters are kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import limbeck
from limbeck.core.batch import Batch
from limbeck.core.data import TensorData
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError
from limbeck.core.method import fingerprint
from limbeck.diffusion.conditions import Conditions
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.guided import GuidedDenoiser, GuidedNetwork, unguided
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.schedules import VPCosine
from limbeck.methods.samplers.agd import AGD
from limbeck.networks.diffusion_mlp import DiffusionMLP
from tests.helpers import resumed_equals_uninterrupted

torch.set_num_threads(1)
CLASSES = torch.arange(12) % 3


def teacher(seed: int = 0, width: int = 12) -> Denoiser:
    torch.manual_seed(seed)
    module = DiffusionMLP((2,), width=width, blocks=2, num_classes=3, time_features=4)
    nn.init.normal_(module.last.weight, std=0.3)
    return Denoiser(module, VPCosine(), "v", null_cond=torch.tensor(3)).eval()


def make(base: Denoiser | None = None, **settings) -> AGD:  # type: ignore[no-untyped-def]
    torch.manual_seed(1)
    given = {"steps": 25, "batch_size": 16, "trajectories": 8, "teacher_nfe": 4, "adapter_dim": 8, **settings}
    return AGD(base or teacher(), CLASSES, **given)


def shaken(method: AGD) -> AGD:
    """With adapters that do something."""
    for network in (method.student.module, method.ema.module):
        torch.manual_seed(2)
        for adapter in network.adapters.adapters:
            nn.init.normal_(adapter.out.weight, std=0.5)
    return method


X, T = torch.randn(6, 2, generator=torch.Generator().manual_seed(3)), torch.linspace(0.2, 0.9, 6)
C = torch.arange(6) % 3


def fitted(method: AGD, train=None) -> AGD:  # type: ignore[no-untyped-def]
    Engine(None, EngineConfig(progress=False)).run(method, method.stages(train, None, seed=0))
    return method


# ---- one evaluation ------------------------------------------------------------------------------------------------------


def test_at_the_start_the_student_is_the_conditional_teacher_at_every_scale():
    method = make()
    for w in (1.0, 3.0, torch.linspace(1, 6, 6)):
        assert torch.equal(method.student.predict(X, T, C, "x0", w), method.teacher.predict(X, T, C))


@pytest.mark.parametrize("target", ["x0", "v", "eps"])
def test_a_guided_prediction_takes_one_evaluation_and_a_batch_equals_separate_calls(target):
    method = shaken(make())
    student = method.student.eval()
    w = torch.tensor([1.0, 1.5, 2.0, 3.0, 5.0, 6.0])
    before = student.evaluations
    together = student.predict(X, T, C, target, w)
    assert student.evaluations == before + 1
    for i in range(6):
        alone = student.predict(X[i : i + 1], T[i], C[i : i + 1], target, float(w[i]))
        torch.testing.assert_close(alone[0], together[i])
    plain = method.teacher.predict(X, T, C, target)
    assert torch.equal(together[0], plain[0]) and not torch.isclose(together, plain).all(1)[1:].any()


def test_calls_of_a_sampler_are_halved_exactly():
    method = shaken(make())
    calls = [0]
    method.teacher.module.register_forward_hook(lambda m, a, o: calls.__setitem__(0, calls[0] + len(a[0])))
    guided = method.teacher_sampler(guidance=3.0)
    made = method.sampler()
    assert (guided.nfe, made.nfe) == (8, 4)
    for sampler, rows in ((guided, 8 * 6), (made, 4 * 6)):
        calls[0] = 0
        found = sampler.sample(X, C)
        assert calls[0] == rows and found.nfe == sampler.nfe
    assert made.replace(guidance=5.0).nfe == 4


def test_no_condition_is_the_base_and_a_negative_one_is_refused():
    method = shaken(make())
    assert torch.equal(method.student.predict(X, T, None, "v", 3.0), method.teacher.predict(X, T, None, "v"))
    with pytest.raises(InputError, match="takes no negative one"):
        method.student.predict(X, T, C, "v", 3.0, negative=C)
    with pytest.raises(InputError, match="needs a GuidedNetwork"):
        GuidedDenoiser(method.teacher.module, VPCosine(), "v")


# ---- the base ----------------------------------------------------------------------------------------------------------


def test_the_base_is_the_teachers_network_and_never_changes():
    base = teacher()
    weights, keys, before = fingerprint(base.module), list(base.state_dict()), base.predict(X, T, C)
    method = fitted(make(base))
    assert method.student.module.base is base.module and method.ema.module.base is base.module
    assert fingerprint(base.module) == weights and list(base.state_dict()) == keys
    assert torch.equal(base.predict(X, T, C), before)  # hooks on, nothing told
    assert torch.equal(unguided(method.student).predict(X, T, C), before)
    assert not torch.allclose(method.student.predict(X, T, C, "x0", 3.0), before)
    method.student.module.remove()
    assert not any(m._forward_hooks for m in base.modules())
    assert all(".adapters." in k for k in method.student.state_dict())


def test_only_adapters_train_and_only_they_are_in_checkpoints():
    method = make()
    method(method.record().draw(16, torch.Generator().manual_seed(0))).backward()
    trained = list(method.trainable_parameters())
    assert {id(p) for p in trained} == {id(p) for p in method.student.module.adapters.parameters()}
    assert all(p.grad is None for p in method.teacher.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    tensors = method.training_state()["tensors"]
    assert all("adapters" in k or k == "ema._extra_state" for k in tensors)
    base = sum(p.numel() for p in method.teacher.module.parameters())
    assert method.parameter_share == sum(p.numel() for p in trained) / base


# ---- learning ----------------------------------------------------------------------------------------------------------


def state_batch(method: AGD) -> Batch:
    return Batch(method.record().batch(torch.arange(12)))


@pytest.mark.parametrize("loss", ["l2", "l1", "cosine", "sigma"])
def test_losses_equal_their_equations(loss):
    method = shaken(make(loss=loss)).eval()
    states = state_batch(method).inputs
    method.double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in states.items()}
    found = method.losses(Batch(inputs))["guidance"]
    guided = method.student.predict(inputs["x_t"], inputs["t"], inputs["cond"], "v", inputs["w"])
    wanted = inputs["prediction"]
    error = guided - wanted
    squares = error.square().mean(1)
    plain = method.teacher.predict(inputs["x_t"], inputs["t"], inputs["cond"], "v")
    cosine = (plain * wanted).sum(1) / (plain.norm(dim=1) * wanted.norm(dim=1))
    expected = {
        "l2": squares.mean(),
        "l1": error.abs().mean(),
        "cosine": (0.5 * (1 - cosine).abs() * squares).mean(),
        "sigma": (torch.sin(torch.pi * inputs["t"] / 2) * squares).mean(),
    }[loss]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_recorded_states_are_guided_trajectories_of_the_teacher():
    method = make()
    store = method.record(seed=4)
    assert store.done == 8 and len(store) == 32 and method.counters["teacher_evaluations"] == 2 * 8 * 4
    assert (store.w >= 1).all() and (store.w <= 6).all() and store.w.unique().numel() == 8
    found = store.batch(torch.arange(32))
    again = method.teacher.predict(found["x_t"], found["t"], found["cond"], "v", found["w"]).detach()
    torch.testing.assert_close(again, found["prediction"])
    other = make()
    assert torch.equal(other.record(seed=4).states, store.states)  # a function of the seed
    assert not torch.equal(other.record(seed=5).states, store.states)


def test_training_closes_the_gap_to_guidance():
    method = make(steps=250, batch_size=64, trajectories=200, teacher_nfe=6, lr=4e-3, adapter_dim=16, ema=0.98)
    fitted(method)
    z = torch.randn(200, 2, generator=torch.Generator().manual_seed(9))
    cond = torch.arange(200) % 3
    for w in (2.0, 5.0):
        wanted = method.teacher_sampler(guidance=w).sample(z, cond).x
        plain = method.teacher_sampler(guidance=1.0).sample(z, cond).x
        found = method.sampler().replace(guidance=w).sample(z, cond).x
        assert (found - wanted).norm(dim=1).mean() < 0.35 * (plain - wanted).norm(dim=1).mean()


@pytest.mark.parametrize("adapter", ["cross_attention", "offset", "gated"])
@pytest.mark.parametrize("told", [("w",), ("w", "t", "c")])
def test_every_kind_trains(adapter, told):
    method = make(adapter=adapter, told=told)
    batch = state_batch(method)
    optimizer = torch.optim.AdamW(method.trainable_parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = method(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_diffusion_states_need_samples():
    data = TensorData(torch.randn(20, 2), torch.arange(20) % 3)
    method = make(states="diffusion")
    found = method.record(data).batch(torch.arange(32))
    again = method.teacher.predict(found["x_t"], found["t"], found["cond"], "v", found["w"]).detach()
    torch.testing.assert_close(again, found["prediction"])
    fitted(method, data)
    for nothing in (None, Conditions(CLASSES)):
        with pytest.raises(InputError, match="needs samples with their conditions"):
            method.record(nothing)


def test_full_guidance_distillation_trains_a_copy_that_is_told_w():
    base = teacher()
    weights = fingerprint(base.module)
    method = make(base, train="all")
    assert method.student.module.base is not base.module and method.parameter_share > 1
    assert [b.path for b in method.student.module.adapters.settings.blocks] == ["time"]
    assert torch.equal(method.student.predict(X, T, C, "x0", 4.0), base.predict(X, T, C))
    method(state_batch(method)).backward()
    assert all(p.grad is not None for p in method.student.module.base.parameters())
    fitted(method)
    assert fingerprint(base.module) == weights
    student = method.student.eval()
    assert not torch.allclose(student.predict(X, T, C, "x0", 1.0), base.predict(X, T, C))  # w = 1 is told, too
    assert not torch.allclose(student.predict(X, T, C, "x0", 1.0), student.predict(X, T, C, "x0", 5.0))
    assert method.sampler().nfe == 4


@pytest.mark.parametrize("settings", [{}, {"train": "all"}, {"adapter": "offset", "adapter_dropout": 0.2}])
def test_resume_is_exact(settings, tmp_path):
    resumed_equals_uninterrupted(lambda: make(**settings), None, tmp_path)


def test_resume_in_the_middle_of_recording(tmp_path, monkeypatch):
    monkeypatch.setattr("limbeck.methods.samplers.agd.CHUNK", 1)
    resumed_equals_uninterrupted(lambda: make(), None, tmp_path, stops=(3, 7), every=2)


# ---- keeping -----------------------------------------------------------------------------------------------------------


def test_the_artifact_is_the_adapters_alone(tmp_path):
    base = teacher()
    method = fitted(make(base, time_path="time"))
    method.save_artifact(tmp_path, {"method": "agd"})
    sampler = method.sampler()
    size = sum(p.numel() for p in method.student.module.adapters.parameters())
    assert (tmp_path / "model.safetensors").stat().st_size < 4 * size + 8000
    found = limbeck.load(tmp_path, model=teacher()).content
    assert isinstance(found, Sampler) and found.describe() == sampler.describe()
    torch.testing.assert_close(found.sample(X, C).x, sampler.sample(X, C).x)
    alone = limbeck.load(tmp_path).content
    assert alone.settings == method.student.module.adapters.settings
    assert "pipe(" in (tmp_path / "README.md").read_text()
    beside = limbeck.load(tmp_path, model=base).content  # on the network that carries the method's own
    torch.testing.assert_close(beside.sample(X, C).x, sampler.sample(X, C).x)
    with pytest.raises(InputError, match="no block"):
        limbeck.load(tmp_path, model=Denoiser(nn.Linear(2, 2), VPCosine(), "v"))


def test_adapters_move_to_a_fine_tuned_copy():
    method = shaken(make())
    tuned = copy.deepcopy(teacher())
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.01 * torch.randn_like(p))
    network = GuidedNetwork(tuned.module, copy.deepcopy(method.student.module.adapters), owned=False)
    moved = GuidedDenoiser.of(tuned, network)
    added = moved.predict(X, T, C, "v", 4.0) - tuned.predict(X, T, C, "v")
    own = method.student.predict(X, T, C, "v", 4.0) - method.teacher.predict(X, T, C, "v")
    assert (added - own).norm() < 0.3 * own.norm()
    assert not torch.equal(added, own)


def test_full_distillation_is_kept_whole(tmp_path):
    method = fitted(make(train="all"))
    method.save_artifact(tmp_path, {})
    found = limbeck.load(tmp_path, model=teacher(seed=5)).content
    torch.testing.assert_close(found.sample(X, C).x, method.sampler().sample(X, C).x)
    with pytest.raises(InputError, match="holds a whole network"):
        limbeck.load(tmp_path)


def test_a_run_judges_by_the_same_noise(tmp_path):
    data = TensorData(torch.randn(30, 2), torch.arange(30) % 3)
    run = limbeck.fit(
        AGD, data, teacher=teacher(), test=data, out=tmp_path / "run", engine={"progress": False}, steps=3,
        trajectories=4, teacher_nfe=4, batch_size=8, judge_count=20,
    )  # fmt: skip
    rows = {r["who"]: r for r in run.result["rows"]}
    assert rows["student"]["nfe"] == 4 and rows["teacher, 4 steps"]["nfe"] == 8
    assert rows["without guidance"]["nfe"] == rows["teacher, 2 steps"]["nfe"] == 4
    assert limbeck.load(tmp_path / "run", model=teacher()).content.nfe == 4


# ---- mistakes ----------------------------------------------------------------------------------------------------------


def test_mistakes_are_named():
    base = teacher()
    with pytest.raises(InputError, match="takes no student"):
        AGD(base, CLASSES, base)
    with pytest.raises(InputError, match="no null condition"):
        AGD(Denoiser(base.module, VPCosine(), "v"), CLASSES)
    with pytest.raises(InputError, match="needs conditions to guide towards"):
        AGD(base, None)
    with pytest.raises(InputError, match="must rise"):
        AGD(base, CLASSES, w_range=(3, 2))
    with pytest.raises(InputError, match="not both"):
        AGD(base, CLASSES, None, AGD.Config(), steps=3)
    with pytest.raises(InputError, match="teacher must be a Denoiser"):
        AGD(base.module, CLASSES)
    with pytest.raises(InputError, match="learns from recorded states"):
        make(base)(Batch(X, C))
