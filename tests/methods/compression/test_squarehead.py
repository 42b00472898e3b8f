"""SquareHead: the loss against its equation, masks that hold, cycles, resume, bad input."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from limbeck import networks
from limbeck.core.batch import Batch
from limbeck.core.engine import Engine
from limbeck.core.errors import InputError
from limbeck.methods.compression import SquareHead
from limbeck.tasks.text_windows import TokenWindows
from tests.helpers import lines, resumed_equals_uninterrupted
from tests.methods.compression.sparse_models import DATA, QUIET, batch, gpt, made, run


def hidden(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Outputs of the blocks of a GPT-2, by hooks of one's own."""
    found: list[Tensor] = []
    handles = [
        b.register_forward_hook(lambda _, __, y: found.append(y[0] if isinstance(y, tuple) else y))
        for b in model.transformer.h
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return found


# ---- the loss ----------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_equation() -> None:
    method = made(
        gpt(0), gpt(1), sparsity=0.5, ce_weight=0.5, kd_weight=2.0, temperature=3.0, feature_weight=1.5
    ).eval()
    mask = torch.ones(4, 8, dtype=torch.long)
    mask[1, 5:] = 0
    given = batch(attention_mask=mask)
    labels = given.labels.masked_fill(mask == 0, -100)
    losses = method.losses(Batch(given.inputs, labels))
    student, teacher = method.student, method.teachers.models[0]
    with torch.no_grad():
        z_s, z_t = (m(**given.inputs).logits[:, :-1].flatten(0, 1) for m in (student, teacher))
        targets = labels[:, 1:].flatten()
        there = targets != -100
        ce = F.cross_entropy(z_s[there], targets[there])
        p_t = (z_t[there] / 3).log_softmax(-1)
        kd = 9 * (p_t.exp() * (p_t - (z_s[there] / 3).log_softmax(-1))).sum(-1).mean()
        valid, features = mask.bool(), torch.tensor(0.0)
        for f_s, f_t in zip(hidden(student, given.inputs), hidden(teacher, given.inputs), strict=True):
            features += (f_s[valid] - f_t[valid]).square().mean() / (f_t[valid].square().mean() + 1e-8)
    for name, value in (("ce", ce), ("kd", kd), ("features", features)):
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses.total, 0.5 * ce + 2 * kd + 1.5 * features, rtol=1e-4, atol=1e-6)


def test_padding_counts_nowhere() -> None:
    mask = torch.ones(4, 8, dtype=torch.long)
    mask[:, 6:] = 0
    method = made(gpt(0), gpt(1), ce_weight=0.0).eval()
    given = batch(attention_mask=mask)
    changed = copy.deepcopy(given)
    changed.inputs["input_ids"][:, 6:] = 3  # causal, so nothing before it sees this
    torch.testing.assert_close(method.losses(given).total, method.losses(changed).total)


def test_equal_models_have_no_distance_and_no_gradient() -> None:
    method = made(sparsity=0.0, ce_weight=0.0, kd_weight=1.0).eval()
    losses = method.losses(batch())
    assert losses["features"] == 0 and abs(losses["kd"].item()) < 1e-6
    losses["features"].backward()
    assert all(p.grad is None or not p.grad.any() for p in method.student.parameters())
    assert all(p.grad is None for p in method.teachers.parameters())


class Chain(nn.Module):
    """Blocks with outputs of very different sizes."""

    def __init__(self, scales: tuple[float, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in scales)
        with torch.no_grad():
            for layer, scale in zip(self.layers, scales, strict=True):
                layer[2].weight.mul_(scale)
                layer[2].bias.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_the_denominator_makes_blocks_of_all_sizes_count() -> None:
    torch.manual_seed(0)
    student = Chain((1.0, 1000.0, 1.0))
    teacher = copy.deepcopy(student)
    with torch.no_grad():  # every block of the student is off by the same share of its own size
        for layer in student.layers:
            layer[2].weight.mul_(1.1)
    given = Batch(torch.randn(32, 6))
    shares = {}
    for kind in ("squarehead", "l2"):
        method = made(copy.deepcopy(student), teacher, ce_weight=0.0, feature_loss=kind, sparsity=0.5).eval()
        with method._taps as own:
            method.student(given.inputs)
        with torch.no_grad():
            taught = method.teach(given).features
        errors = method.block_errors(own, taught, given)
        total = method.losses(given)["features"]
        torch.testing.assert_close(total, errors.sum())
        shares[kind] = (errors / total).tolist()
    first, second, _ = shares["squarehead"]  # off by the same share, and a thousand times larger
    assert 0.5 < first / second < 2
    first, second, _ = shares["l2"]
    assert second > 0.999 and first < 1e-4


# ---- masks -------------------------------------------------------------------------------------------------------------


def test_only_layers_in_blocks_are_pruned_unless_others_are_named() -> None:
    method = made(sparsity=0.75)
    assert set(method.layers) == {
        f"transformer.h.{n}.{layer}"
        for n in (0, 1)
        for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert set(made(layers=(r"lm_head", r"h\.0\.mlp")).layers) == {
        "lm_head",
        "transformer.h.0.mlp.c_fc",
        "transformer.h.0.mlp.c_proj",
    }
    assert not any("attn" in name for name in made(keep=("attn",)).layers)


def test_a_loop_of_ones_own() -> None:
    method = made(sparsity=0.75)
    teacher = copy.deepcopy(method.teachers.state_dict())
    optimizer = torch.optim.AdamW(method.trainable_parameters(), lr=0.01, weight_decay=0.1)
    with pytest.raises(InputError, match="still dense"):
        method(batch())
    method.prune()
    method.hold(optimizer)
    before = method(batch()).item()
    for _ in range(20):
        optimizer.zero_grad()
        loss = method(batch())
        loss.backward()
        optimizer.step()
        assert method.held.sparsity == 0.75
        for name in method.held.names:
            weight = method.student.get_parameter(name)
            assert float((weight == 0).double().mean()) == 0.75
    assert loss.item() < 0.8 * before
    assert all(torch.equal(v, teacher[k]) for k, v in method.teachers.state_dict().items())


def test_cycles_grow_sparser_with_a_fresh_learning_rate(tmp_path: Path) -> None:
    targets = (0.5, 0.75, 0.875)
    method = made(growth="staged", targets=targets, steps=20, warmup=0.0, evaluations=1, batch_size=8)
    stages = method.stages(DATA, DATA, seed=0)
    assert [s.name for s in stages] == [f"fine-tuning at {t:g}" for t in targets]
    assert sum(s.steps for s in stages) == 20
    Engine(tmp_path, QUIET, seed=1).run(method, stages)
    rows = lines(tmp_path)
    for stage, target in zip(stages, targets, strict=True):
        own = [r for r in rows if r["stage"] == stage.name]
        assert [r["sparsity"] for r in own if r["split"] == "val"] == [target] * (len(own) - stage.steps)
        rates = [r["lr"] for r in own if r["split"] == "train"]
        assert rates[0] == max(rates) > 1.5e-3 and rates[-1] == 0
    assert method.history[:, 0].tolist() == pytest.approx(targets, abs=1e-3)
    assert (method.history[:, 1:] > 0).all()
    assert made(growth="staged", sparsity=0.8).config.cycles() == (0.5, 0.67, 0.75, 0.8)


@pytest.mark.parametrize("growth", ["linear", "cubic"])
def test_sparsity_grows_within_one_course_of_the_learning_rate(growth: str, tmp_path: Path) -> None:
    method = made(growth=growth, sparsity=0.9, steps=20, prunings=4, growth_end=0.8, evaluations=20, batch_size=8)
    run(method, tmp_path, DATA)
    seen = [r["sparsity"] for r in lines(tmp_path) if r["split"] == "val"]
    assert seen == sorted(seen) and len(set(seen)) == 4
    assert seen[-1] == pytest.approx(0.9, abs=2e-3)


def test_n_of_m(tmp_path: Path) -> None:
    method = run(made(pattern="2:4", pruner="obc", steps=5, batch_size=8, container="nm", values="float16"))
    for name, layer in method.layers.items():
        weight = layer.weight.T  # (out, in) of a Conv1D
        assert ((weight != 0).reshape(-1, 4).sum(1) <= 2).all(), name
    assert method.storage().bits_per_number == (2 * (16 + 2)) / 4


def test_the_solver_starts_better_than_magnitude() -> None:
    """On a trained model pruned at once, without a step of fine-tuning."""
    torch.manual_seed(0)
    student, data = gpt(), TokenWindows(torch.arange(2000) * 7 % 11, 8)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
    for step in range(60):
        found = data.fetch(torch.arange(step, step + 16), None)
        optimizer.zero_grad()
        student(**found.inputs, labels=found.labels).loss.backward()
        optimizer.step()
    nll = {}
    for pruner in ("magnitude", "obc"):
        method = made(copy.deepcopy(student), student, sparsity=0.7, pruner=pruner, damp=0.01)
        method.prune([data.fetch(torch.arange(64), None)])
        assert method.held.sparsity == pytest.approx(0.7, abs=2e-3)
        nll[pruner] = method.quick_metrics(data)["nll"]
    assert nll["obc"] < nll["magnitude"]


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0.75},
        {"growth": "staged", "targets": (0.5, 0.8), "pruner": "obc", "calibration": 8},
        {"growth": "cubic", "prunings": 4, "sparsity": 0.9},
    ],
    ids=["one-shot", "staged", "cubic"],
)
def test_resume_is_exact(settings: dict[str, Any], tmp_path: Path) -> None:
    def method() -> SquareHead:
        torch.manual_seed(0)
        student = networks.build("gpt-d16-l2-h2", in_shape=(8,), num_classes=11)
        return made(student, steps=30, batch_size=8, evaluations=0, **settings)

    stops = (7, 12) if settings.get("growth") == "staged" else (7, 19)  # in each stage
    found = resumed_equals_uninterrupted(method, DATA, tmp_path, stops)
    assert found.held.sparsity > 0.74


# ---- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be float >= 0 and < 1 \(got 1.0\)"),
        ({"sparsity": -0.1}, r"sparsity must be float >= 0 and < 1"),
        ({"pattern": "4:2"}, "keeps n of m weights"),
        ({"pattern": "0.5"}, "pattern is n:m"),
        ({"pattern": "3:5"}, "has 16 inputs, which 5 does not divide"),
        ({"pattern": "2:4", "growth": "cubic"}, "growth must be one-shot"),
        ({"targets": (0.5,)}, "targets are for growth staged"),
        ({"targets": (0.5, 0.4), "growth": "staged"}, "must rise"),
        ({"container": "nm"}, "give a pattern"),
        ({"layers": ("ln_1",)}, "LayerNorm, which cannot be compressed"),
        ({"layers": ("nowhere",)}, "no layer's name fits 'nowhere'"),
        ({"blocks": ("h",)}, "no module's path matches 'h'"),
        ({"keep": ("transformer",)}, "no linear or convolutional layer in the blocks"),
        ({"sparsity": 0.9999}, "leaves nothing of layer"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        made(**settings)


def test_models_and_data_that_do_not_fit_are_named() -> None:
    with pytest.raises(InputError, match="student has 2 blocks and the teacher 3"):
        made(gpt(), networks.build("gpt-d16-l3-h2", in_shape=(8,), num_classes=11))
    tied = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=12, n_embd=16, n_layer=2, n_head=2))
    with pytest.raises(InputError, match="'lm_head' shares its weight with 'transformer.wte'"):
        made(tied, layers=("lm_head", "mlp"))
    with pytest.raises(InputError, match="no blocks are found in Linear"):
        made(nn.Linear(2, 2))
    with pytest.raises(InputError, match="needs calibration batches"):
        made(pruner="obc").prune()
    method = made(sparsity=0.5)
    with pytest.raises(InputError, match="labels go from 50 to 50"):
        method.check(Batch(batch().inputs, torch.full((4, 8), 50)))
    with pytest.raises(InputError, match="every label of the first batch is -100"):
        method.check(Batch(batch().inputs, torch.full((4, 8), -100)))
    with pytest.raises(InputError, match="2 steps are too few for 3 cycles"):
        made(growth="staged", targets=(0.1, 0.2, 0.3), steps=2).stages(DATA)
    with pytest.raises(InputError, match="a copy of the teacher"):
        SquareHead.build(
            SquareHead.Setup.make(student="gpt-d16-l2-h2", teacher=("gpt-d16-l3-h2",)), SquareHead.Config()
        )


def test_a_check_leaves_everything_as_it_was() -> None:
    method = made(gpt(0), gpt(1), sparsity=0.5)
    before = copy.deepcopy(method.training_state()["tensors"])
    method.check(batch())
    assert all(torch.equal(v, before[k]) for k, v in method.training_state()["tensors"].items())
    assert method.level < 0
