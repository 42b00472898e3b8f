"""Quantized distillation: the loss against numpy, where gradients go, every mode's stages, what is stored, resume, bad input."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import limbeck
from limbeck.blocks.packed import load_state
from limbeck.blocks.quantizers import quantise, scaled, to_buckets
from limbeck.blocks.weight_quantizer import quantizers_of
from limbeck.core.batch import Batch
from limbeck.core.data import TensorData
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError
from limbeck.methods.compression import QuantizedDistillation
from tests.helpers import resumed_equals_uninterrupted

T = 2.0


def student(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)
    )


def teacher() -> nn.Sequential:
    return student(9).eval()


def data(n: int = 48) -> TensorData:
    torch.manual_seed(3)
    labels = torch.arange(n) % 3
    x = torch.randn(n, 1, 6, 6)
    x[torch.arange(n), 0, labels] += 2
    return TensorData(x, labels)


def batch(n: int = 12) -> Batch:
    return data(n).fetch(torch.arange(n), None)


def run(method: QuantizedDistillation, train: TensorData | None = None) -> QuantizedDistillation:
    train = train or data()
    Engine(None, EngineConfig(progress=False), seed=1).run(method, method.stages(train, None, seed=0))
    return method


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)


def reference(zs: np.ndarray, zt: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ce = -log_softmax(zs)[np.arange(len(y)), y]
    ls, lt = log_softmax(zs / T), log_softmax(zt / T)
    return ce, (np.exp(lt) * (lt - ls)).sum(-1)


# ---- the loss ------------------------------------------------------------------------------------------------------------


def logits(method: QuantizedDistillation, b: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the quantised student, by hand from quantised weights, in evaluation mode; the teacher's; labels."""
    plain = student()
    with torch.no_grad():
        for number in (0, 4, 6):
            plain[number].weight.copy_(quantise(plain[number].weight, 4, 256))
        zs = plain.eval()(b.inputs).double().numpy()
        return zs, method.teachers.models[0](b.inputs).double().numpy(), b.labels.numpy()


def test_loss_equals_the_equation_at_the_quantised_weights() -> None:
    method, b = QuantizedDistillation(student(), teacher(), temperature=T, alpha=0.6).eval(), batch()
    ce, kl = reference(*logits(method, b))
    losses = method.losses(b)
    assert losses["ce"].item() == pytest.approx(ce.mean(), rel=1e-5)
    assert losses["kd"].item() == pytest.approx(kl.mean(), rel=1e-4)
    assert losses.total.item() == pytest.approx(0.4 * ce.mean() + 0.6 * T**2 * kl.mean(), rel=1e-5)


def test_the_codes_reduction_divides_by_the_classes() -> None:
    ours, b = QuantizedDistillation(student(), teacher()).eval(), batch()
    theirs = QuantizedDistillation(student(), teacher(), kl_reduction="mean").eval()
    torch.testing.assert_close(ours.losses(b)["kd"], 3 * theirs.losses(b)["kd"])


def test_without_a_teacher_it_is_quantisation_aware_training() -> None:
    method, b = QuantizedDistillation(student(), teacher(), alpha=0).eval(), batch()
    ce, _ = reference(*logits(method, b))
    assert list(method.losses(b)) == ["ce"]
    assert method.losses(b).total.item() == pytest.approx(ce.mean(), rel=1e-5)
    assert method.counters["teacher_forwards"] == 0


@pytest.mark.parametrize("ask", ["uncertain", "mistaken"])
def test_the_teacher_is_asked_about_some(ask: Any) -> None:
    b = batch(30)
    zs, zt, y = logits(QuantizedDistillation(student(), teacher()).eval(), b)
    ce, kl = reference(zs, zt, y)
    p = np.exp(log_softmax(zs))
    bits = -(p * np.log2(p)).sum(-1)
    cutoff = float(np.median(bits))
    method = QuantizedDistillation(
        student(), teacher(), ask=ask, alpha=0.6, temperature=T, entropy_cutoff=cutoff
    ).eval()
    asked = bits > cutoff if ask == "uncertain" else zs.argmax(-1) != y
    assert 0 < asked.mean() < 1
    rows = np.where(asked, 0.4 * ce + 0.6 * T**2 * kl, ce)
    losses = method.losses(b)
    assert losses.total.item() == pytest.approx(rows.mean(), rel=1e-5)
    assert losses.observed["asked"].item() == pytest.approx(asked.mean())


def test_asking_at_random_follows_the_entropy() -> None:
    method = QuantizedDistillation(student(), teacher(), ask="random")
    torch.manual_seed(0)
    z = torch.tensor([[0.0, 0, 0], [50, 0, 0]]).repeat_interleave(2000, 0)
    z[1000:2000, 0] = 2.0
    p = torch.softmax(z[1000], 0)
    asked = method.asked(z, None).float()
    assert asked[:1000].mean() == 1  # a uniform answer has the largest entropy
    assert asked[2000:].mean() == 0
    expected = -(p * p.log()).sum() / torch.tensor(3.0).log()
    assert asked[1000:2000].mean().item() == pytest.approx(expected.item(), abs=0.05)


def test_padding_tokens_count_nowhere() -> None:
    torch.manual_seed(0)
    small, big = nn.Sequential(nn.Linear(4, 5)), nn.Linear(4, 5)
    x, labels = torch.randn(2, 3, 4), torch.tensor([[1, 2, -100], [0, -100, -100]])
    valid = labels.flatten() != -100
    padded = QuantizedDistillation(copy.deepcopy(small), big).losses(Batch(x, labels))
    rows = QuantizedDistillation(small, big).losses(Batch(x.flatten(0, 1)[valid], labels.flatten()[valid]))
    for name in ("ce", "kd"):
        torch.testing.assert_close(padded[name], rows[name])


# ---- gradients -----------------------------------------------------------------------------------------------------------


def test_the_weights_get_the_gradient_at_the_quantised_weights() -> None:
    method, b = QuantizedDistillation(student(), teacher(), temperature=T, alpha=0.7), batch()
    method(b).backward()
    plain, big = student(), teacher()
    with torch.no_grad():
        for number in (0, 4, 6):
            plain[number].weight.copy_(quantise(plain[number].weight, 4, 256))
    zs = plain.train()(b.inputs)
    kl = F.kl_div(F.log_softmax(zs / T, -1), F.softmax(big(b.inputs) / T, -1), reduction="batchmean")
    (0.3 * F.cross_entropy(zs, b.labels) + 0.7 * T**2 * kl).backward()
    for number in (0, 4, 6):
        torch.testing.assert_close(
            method.student[number].parametrizations.weight.original.grad, plain[number].weight.grad
        )
    torch.testing.assert_close(method.student[1].weight.grad, plain[1].weight.grad)


def test_learning_levels_leaves_everything_else_alone() -> None:
    method = QuantizedDistillation(student(), teacher(), mode="levels")
    method(batch()).backward()
    with_gradient = {n for n, p in method.named_parameters() if p.grad is not None}
    assert with_gradient == {f"student.{k}.parametrizations.weight.0.levels" for k in (0, 4, 6)}


def test_levels_are_trained_and_statistics_go_on() -> None:
    method = QuantizedDistillation(student(), teacher(), mode="levels", warm_epochs=0, steps=12, level_lr=0.02)
    before = copy.deepcopy(method.student.state_dict())
    run(method)
    after = method.student.state_dict()
    moved = {k for k in after if not torch.equal(after[k], before[k])}
    levels = {f"{k}.parametrizations.weight.0.levels" for k in (0, 4, 6)}
    assert moved == levels | {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert all((q.levels.diff() >= 0).all() for q in method.quantizers.values())


def test_levels_start_at_the_quantiles() -> None:
    method = QuantizedDistillation(student(), teacher(), mode="levels", bucket=None)
    w = student()[4].weight.detach().flatten()
    v = (w - w.min()) / (w.max() - w.min())
    np.testing.assert_allclose(
        method.quantizers["4"].levels.detach(), np.percentile(v, np.linspace(0, 100, 4)), atol=1e-6
    )


def test_the_student_before_quantisation_teaches_the_levels() -> None:
    method, b = QuantizedDistillation(student(), teacher(), mode="levels", alpha=1, temperature=T).eval(), batch()
    with torch.no_grad():
        zs, zt = method.student(b.inputs), student().eval()(b.inputs)
    _, kl = reference(zs.double().numpy(), zt.double().numpy(), b.labels.numpy())
    assert method.losses(b)["kd"].item() == pytest.approx(kl.mean(), rel=1e-4)
    assert method.counters["teacher_forwards"] == 0
    other = QuantizedDistillation(student(), teacher(), mode="levels", alpha=1, level_teacher="teacher").eval()
    other.losses(b)
    assert other.counters["teacher_forwards"] == len(b)


# ---- stages --------------------------------------------------------------------------------------------------------------


def test_stages_by_mode() -> None:
    names = {
        mode: [s.name for s in QuantizedDistillation(student(), teacher(), mode=mode).stages(data())]
        for mode in ("weights", "levels", "mixed", "none")
    }
    assert names == {
        "weights": ["distillation", "quantisation"],
        "levels": ["distillation", "levels"],
        "mixed": ["distillation", "mixed"],
        "none": ["distillation"],
    }
    assert [s.name for s in QuantizedDistillation(student(), teacher(), warm_epochs=0).stages(data())] == [
        "quantisation"
    ]


def test_the_warm_stage_is_in_full_precision() -> None:
    method = QuantizedDistillation(student(), teacher(), mode="none", warm_epochs=2, batch_size=16)
    run(method)
    torch.testing.assert_close(method.full_precision[4].weight, method._weight("4"))
    assert not torch.equal(method._weight("4"), student()[4].weight)
    x = batch().inputs
    assert not torch.equal(method.compressed()(x), method.full_precision(x))
    assert torch.equal(method.compressed()(x), method.rounded()[0](x))


def test_mixed_alternates_and_ends_on_the_weights() -> None:
    method = QuantizedDistillation(
        student(), teacher(), mode="mixed", warm_epochs=0, epochs=4, batch_size=16, level_lr=0.01
    )
    (stage,) = method.stages(data())
    assert (stage.steps, stage.stream.steps_per_epoch) == (12, 3)
    phases: list[str] = []
    changes: list[set[str]] = []
    last = copy.deepcopy(method.student.state_dict())

    def watch(step: int) -> None:
        nonlocal last
        now = copy.deepcopy(method.student.state_dict())
        moved = {k for k in now if not torch.equal(now[k], last[k])}
        changes.append({"levels" if "levels" in k else "weights" for k in moved if "1." not in k})
        phases.append(method.phase)
        last = now

    stage.after_step = watch
    Engine(None, EngineConfig(progress=False), seed=1).run(method, [stage])
    assert phases == ["levels"] * 3 + ["weights"] * 3 + ["levels"] * 3 + ["weights"] * 3
    assert changes == [{p} for p in phases]


@pytest.mark.parametrize("mode", ["weights", "levels"])
def test_shared_budgets(mode: Any) -> None:
    method = QuantizedDistillation(
        student(), teacher(), mode=mode, bits=3, warm_epochs=0, steps=2, redistribute=True, batch_size=12
    )
    state = copy.deepcopy(method.student[1].state_dict())
    (stage,) = method.stages(data())
    stage.begin()
    counts = [q.count for q in method.quantizers.values()]
    if mode == "levels":
        assert sum(counts) == 24
        assert min(counts) >= 4
    else:
        assert sum(np.log2(counts)) == 9
        assert min(counts) >= 4
    assert len(set(counts)) > 1
    assert all(torch.equal(v, state[k]) for k, v in method.student[1].state_dict().items())
    run(method)
    assert {n: len(t.levels) for n, t in method.tensors().items()} == dict(zip(method.tensors(), counts, strict=True))


# ---- what comes out ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["weights", "levels", "mixed", "none"])
def test_every_result_is_on_the_grid_and_stored_exactly(tmp_path: Path, mode: Any) -> None:
    method = run(
        QuantizedDistillation(student(), teacher(), mode=mode, warm_epochs=1, epochs=2, bucket=50, batch_size=16)
    )
    plain = method.compressed()
    assert set(plain.state_dict()) == set(student().state_dict())
    x = batch().inputs
    if mode != "none":
        assert torch.equal(plain(x), method.student.eval()(x))  # what was trained is what comes out
    for number in (0, 4, 6):
        for row in to_buckets(plain[number].weight.detach(), 50):
            assert len(row.unique()) <= 4
    assert torch.equal(plain[6].bias, method.student[6].bias)
    method.save_compact(tmp_path)
    fresh = student(5)
    fresh.load_state_dict(load_state(tmp_path / "quantised.safetensors"))
    assert torch.equal(fresh.eval()(x), plain(x))
    file = tmp_path / "quantised.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    assert file.stat().st_size - header == method.storage().bytes


def test_sizes_are_those_of_the_formula() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64, bias=False))
    nn.init.uniform_(model[0].weight)
    method = QuantizedDistillation(model, nn.Linear(256, 64), bits=4, bucket=256)
    assert method.storage().ratio() == pytest.approx(32 / (4 + 64 / 256), rel=0.02)


def test_ends_and_chosen_layers() -> None:
    assert list(QuantizedDistillation(student(), teacher(), keep_ends=True).quantizers) == ["4"]
    assert list(QuantizedDistillation(student(), teacher(), layers=("^[46]$",)).quantizers) == ["4", "6"]
    embedding = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 3))
    assert list(QuantizedDistillation(embedding, lambda x: x).quantizers) == ["0", "2"]


def test_a_run_says_what_is_stored_and_how_it_does_in_integers(tmp_path: Path) -> None:
    train = data(96)
    run = limbeck.fit(
        "quantized-distillation",
        train,
        student=student(),
        teacher=teacher(),
        val=data(24),
        test=data(33),
        out=tmp_path / "run",
        warm_epochs=1,
        epochs=1,
        engine={"progress": False},
    )
    rows = {row["who"]: row for row in run.result["rows"]}
    assert list(rows) == ["student", "full precision", "rounded only", "teacher", "student in int8"]
    assert rows["student"]["stored_bytes"] < rows["full precision"]["stored_bytes"] / 2
    assert rows["rounded only"]["compression"] > 2
    assert rows["student in int8"]["latency_ratio"] > 0
    assert run.result["int8_agreement"] >= 0.9
    assert run.result["pictures"][0]["title"] == "Weights and their levels"
    assert (tmp_path / "run" / "artifact" / "quantised.safetensors").exists()
    again = limbeck.load(tmp_path / "run", model=student(7)).content
    x = batch().inputs
    assert torch.equal(again(x), run.method.compressed()(x))


def test_works_in_a_bare_loop() -> None:
    method, train = QuantizedDistillation(student(), teacher(), bits=3, alpha=0), data()
    optimizer = torch.optim.Adam(method.trainable_parameters(), lr=0.02)
    b = train.fetch(torch.arange(48), None)
    first = method(b).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss = method(b)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first
    assert quantizers_of(method.compressed()) == {}


@pytest.mark.parametrize(
    "settings",
    [{"rounding": "stochastic", "redistribute": True}, {"mode": "levels", "redistribute": True}, {"mode": "mixed"}],
    ids=["weights", "levels", "mixed"],
)
def test_resume_is_exact(tmp_path: Path, settings: dict[str, Any]) -> None:
    def make_method() -> QuantizedDistillation:
        return QuantizedDistillation(
            student(), teacher(), warm_epochs=2, epochs=6, batch_size=12, level_lr=0.01, evaluations=0, **settings
        )

    resumed_equals_uninterrupted(make_method, data(), tmp_path, stops=(5, 19))


def test_learned_levels_keep_their_scaled_space() -> None:
    """The level of each code is where the table says, in the buckets of the fixed weights."""
    method = run(QuantizedDistillation(student(), teacher(), mode="levels", warm_epochs=0, steps=5, bucket=32))
    weight, table = method._weight("4").detach(), method.quantizers["4"].levels.detach()
    v, scaling = scaled(to_buckets(weight, 32))
    nearest = (v[..., None] - table).abs().argmin(-1)
    expected = (table[nearest] * scaling.width + scaling.offset).reshape(-1)[: weight.numel()].view_as(weight)
    torch.testing.assert_close(method.compressed()[4].weight, expected)


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match=r"bits must be int >= 1 and <= 8 \(got 9\)"):
        QuantizedDistillation(student(), teacher(), bits=9)
    with pytest.raises(InputError, match="rounding: stochastic needs equally spaced levels, mode levels learns them"):
        QuantizedDistillation(student(), teacher(), mode="levels", rounding="stochastic")
    with pytest.raises(InputError, match="accumulate must be 1 in mode mixed"):
        QuantizedDistillation(student(), teacher(), mode="mixed", accumulate=2)
    with pytest.raises(InputError, match="BatchNorm2d, which cannot be compressed"):
        QuantizedDistillation(student(), teacher(), layers=("^1$",))
    with pytest.raises(InputError, match="keep_ends leaves no layer"):
        QuantizedDistillation(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), teacher(), keep_ends=True)
    with pytest.raises(InputError, match="is parametrised already"):
        QuantizedDistillation(QuantizedDistillation(student(), teacher()).student, teacher())
    with pytest.raises(InputError, match="needs labels"):
        QuantizedDistillation(student(), teacher())(batch().inputs)
