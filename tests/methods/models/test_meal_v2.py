"""MEAL V2: equations against numpy, who gets which gradient, options, stages, resume, use by name and on own modules."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import limbeck
from limbeck.blocks.teachers import Teachers
from limbeck.core.batch import Batch
from limbeck.core.data import TensorData
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError, Interrupted
from limbeck.methods.models import MEALV2
from limbeck.methods.models.meal_v2 import compress_top_k
from limbeck.tasks.augment import ShiftFlip
from limbeck.tasks.base import load_task
from tests.helpers import lines, resumed_equals_uninterrupted

B, C, M = 6, 5, 3


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


class Fixed(nn.Module):
    """Logits that are parameters, so that gradients can be read per sample."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.num_classes = logits.shape[1]
        self.logits = nn.Parameter(logits.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits


def random_logits(seed: int) -> torch.Tensor:
    return torch.randn(B, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def make(**settings: Any) -> tuple[MEALV2, Batch]:
    torch.manual_seed(0)
    teachers = [Fixed(random_logits(m + 1)) for m in range(M)]
    return MEALV2(Fixed(random_logits(0)), teachers, **settings), Batch(torch.zeros(B, 1))


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def small_net(seed: int, width: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, C))


def small_data(n: int = 40, labels: bool = True) -> TensorData:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, 1, 4, 4, generator=generator)
    y = torch.randint(0, C, (n,), generator=generator)
    return TensorData(x, y if labels else None, augment=ShiftFlip(1))


# ---- the equations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adversarial", ["min_max", "official"])
def test_terms_equal_the_equations(adversarial: str) -> None:
    method, batch = make(adversarial=adversarial, discriminator_weight=0.5)
    losses = method.losses(batch)
    z_s, z_t = random_logits(0).numpy(), np.stack([random_logits(m + 1).numpy() for m in range(M)])
    target = softmax(z_t).mean(0)
    similarity = -(target * np.log(softmax(z_s))).sum(-1).mean()
    assert losses["similarity"].item() == pytest.approx(similarity, rel=1e-10)
    # Averaging logits instead of probabilities is another target.
    assert similarity != pytest.approx(-(softmax(z_t.mean(0)) * np.log(softmax(z_s))).sum(-1).mean(), rel=1e-3)

    hidden = np.concatenate([z_s, z_t.mean(0)])
    assert method.discriminator is not None
    layers = [m for m in method.discriminator.modules() if isinstance(m, nn.Linear)]
    for number, layer in enumerate(layers):
        hidden = hidden @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        if number < 2 or adversarial == "official":
            hidden = np.maximum(hidden, 0)
    wanted = np.concatenate([np.tile([1.0, 0.0], (B, 1)), np.tile([0.0, 1.0], (B, 1))])
    sigmoid = 1 / (1 + np.exp(-hidden))
    bce = -(wanted * np.log(sigmoid) + (1 - wanted) * np.log(1 - sigmoid)).mean()
    assert losses["discriminator"].item() == pytest.approx(bce, rel=1e-10)
    assert losses.total.item() == pytest.approx(similarity + 0.5 * bce, rel=1e-10)


def test_similarity_is_kl_plus_the_entropy_of_the_target() -> None:
    """Its gradient is (softmax(z_S) - p_bar) / B, and it is smallest where the student says what the ensemble says."""
    method, batch = make(adversarial="none")
    assert method.discriminator is None
    losses = method.losses(batch)
    assert set(losses) == {"similarity"}
    losses.total.backward()
    target = torch.stack([random_logits(m + 1).softmax(-1) for m in range(M)]).mean(0)
    expected = (random_logits(0).softmax(-1) - target) / B
    assert torch.allclose(method.student.logits.grad, expected, atol=1e-12)
    perfect = MEALV2(Fixed(target.log()), [Fixed(random_logits(m + 1)) for m in range(M)], adversarial="none")
    entropy = -(target * target.log()).sum(-1).mean()
    assert perfect.losses(batch)["similarity"].item() == pytest.approx(entropy.item(), rel=1e-10)
    perfect(batch).backward()
    assert perfect.student.logits.grad.abs().max() < 1e-12


def student_and_discriminator_gradients(**settings: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    method, batch = make(**settings)
    method(batch).backward()
    assert all(p.grad is None for p in method.teachers.parameters())
    assert method.discriminator is not None
    return method.student.logits.grad, [p.grad for p in method.discriminator.parameters()]


def test_the_game_turns_the_students_gradient_round_and_leaves_the_discriminators() -> None:
    without, batch = make(adversarial="none")
    without(batch).backward()
    similarity = without.student.logits.grad

    weight = 0.7
    found, discriminator = student_and_discriminator_gradients(adversarial="min_max", discriminator_weight=weight)
    method, batch = make(adversarial="min_max")
    assert method.discriminator is not None
    z = method.student.logits
    z_bar = torch.stack([random_logits(m + 1) for m in range(M)]).mean(0)
    scores = method.discriminator(torch.cat([z, z_bar]))
    wanted = torch.tensor([[1.0, 0.0]] * B + [[0.0, 1.0]] * B, dtype=torch.float64)
    plain = F.binary_cross_entropy_with_logits(scores, wanted)
    of_student, *of_discriminator = torch.autograd.grad(plain, [z, *method.discriminator.parameters()])
    assert of_student.abs().max() > 1e-4
    assert torch.allclose(found, similarity - weight * of_student, atol=1e-12)
    for one, other in zip(discriminator, of_discriminator, strict=True):
        assert torch.allclose(one, weight * other, atol=1e-12)


def test_the_official_sum_gives_the_student_the_cooperative_gradient() -> None:
    """Descending it makes the student easier to recognise; descending the game's makes it harder."""

    def recognised_after_a_step(sign: float) -> float:
        method, batch = make(adversarial="official")
        method.discriminator = copy.deepcopy(make(adversarial="min_max")[0].discriminator)  # no dead last ReLU
        before = method.losses(batch)["discriminator"]
        (gradient,) = torch.autograd.grad(before, method.student.logits)
        with torch.no_grad():
            method.student.logits -= sign * 0.1 * gradient / gradient.norm()
        return method.losses(batch)["discriminator"].item() - before.item()

    assert recognised_after_a_step(+1) < 0 < recognised_after_a_step(-1)
    official, batch = make(adversarial="official", discriminator_weight=1.0)
    alone, _ = make(adversarial="none")
    found = torch.autograd.grad(official(batch), official.student.logits)[0]
    base = torch.autograd.grad(alone(batch), alone.student.logits)[0]
    term = torch.autograd.grad(official.losses(batch)["discriminator"], official.student.logits)[0]
    assert torch.allclose(found, base + term, atol=1e-12)


def test_the_discriminators_accuracy_is_observed() -> None:
    method, batch = make()
    assert 0 <= method.losses(batch).observed["discriminator_accuracy"] <= 1
    # The student that says what one teacher says cannot be told from it.
    same = MEALV2(Fixed(random_logits(1)), Fixed(random_logits(1)))
    assert same.losses(batch).observed["discriminator_accuracy"].item() == 0.5


# ---- options -----------------------------------------------------------------------------------------------------------


def test_labels_are_not_looked_at() -> None:
    method, batch = make()
    labelled = Batch(batch.inputs, torch.arange(B) % C)
    assert torch.equal(method(batch), method(labelled))
    assert torch.equal(method(batch.inputs), method(batch))


def test_hard_labels_are_an_extra_term_and_are_needed_then() -> None:
    method, batch = make(hard_label_weight=0.3)
    labels = torch.arange(B) % C
    losses = method.losses(Batch(batch.inputs, labels))
    assert losses["ce"].item() == pytest.approx(F.cross_entropy(random_logits(0), labels).item())
    assert losses.total.item() == pytest.approx(
        (losses["similarity"] + 0.1 * losses["discriminator"] + 0.3 * losses["ce"]).item()
    )
    with pytest.raises(InputError, match="needs labels"):
        method(batch)


def test_one_teacher_a_batch_drawn_uniformly() -> None:
    method, batch = make(teacher_choice="random")
    said = torch.stack([random_logits(m + 1) for m in range(M)])
    torch.manual_seed(0)
    drawn = []
    for _ in range(300):
        output = method.ask(batch)
        assert len(output.each) == 1
        drawn.append(int((said == output.each).flatten(1).all(1).nonzero()))
    counts = np.bincount(drawn, minlength=M)
    assert counts.min() > 70
    assert method.counters["teacher_forwards"] == 300 * B  # only the drawn teacher works
    torch.manual_seed(0)
    again = [int((said == method.ask(batch).each).flatten(1).all(1).nonzero()) for _ in range(20)]
    assert again == drawn[:20]


@pytest.mark.parametrize("choice", ["ensemble", "random"])
def test_each_teacher_keeps_its_own_transform(choice: str) -> None:
    student, first, second = small_net(0), small_net(1).eval(), small_net(2).eval()
    x = torch.randn(3, 1, 4, 4)
    teachers = Teachers([first, second], transforms=[None, lambda v: 2 * v + 1])
    method = MEALV2(student, teachers, teacher_choice=choice)
    with torch.no_grad():
        expected = torch.stack([first(x), second(2 * x + 1)])
    if choice == "ensemble":
        assert torch.allclose(method.ask(Batch(x)).each, expected)
    else:
        found = [method.ask(Batch(x)).each[0] for _ in range(12)]
        nearest = [[bool(torch.allclose(f, e)) for e in expected] for f in found]
        assert all(sum(row) == 1 for row in nearest) and np.asarray(nearest).any(0).all()


def test_cutmix_shows_the_same_mixed_images_to_all() -> None:
    seen: dict[str, list[torch.Tensor]] = {"student": [], "a": [], "b": []}

    def spying(name: str, model: nn.Module) -> nn.Module:
        model.register_forward_pre_hook(lambda _, args: seen[name].append(args[0].clone()))
        return model

    method = MEALV2(
        spying("student", small_net(0)), [spying("a", small_net(1)), spying("b", small_net(2))], cutmix=True
    )
    images = torch.arange(8.0)[:, None, None, None].expand(8, 1, 4, 4)
    batch = Batch(images, index=torch.arange(8), view=0)
    method(batch)
    (student,), (a,), (b,) = seen.values()
    assert torch.equal(student, a) and torch.equal(student, b)
    assert not torch.equal(student, images)
    for own, image in enumerate(student):  # at most two sources, one of them the image itself unless it was covered
        assert len(image.unique()) <= 2 and ((image == own).any() or len(image.unique()) == 1)


def test_cutmix_mixes_larger_teacher_inputs_at_the_same_places() -> None:
    method = MEALV2(small_net(0), nn.Sequential(nn.AvgPool2d(2), small_net(1)), cutmix=True)
    images = torch.randn(8, 1, 4, 4)
    mixed = method.mixed(Batch(images, torch.zeros(8).long(), torch.arange(8), 3, images.repeat(1, 1, 2, 2)))
    assert mixed.teacher_inputs.shape == (8, 1, 8, 8)
    assert mixed.index is None and mixed.view is None and mixed.labels is not None
    assert torch.isfinite(method(Batch(images, teacher_inputs=images.repeat(1, 1, 2, 2))))


def test_cutmix_cannot_be_cached(tmp_path: Path) -> None:
    data = small_data()
    method = MEALV2(small_net(0), small_net(1), cutmix=True, views=2)
    with pytest.raises(InputError, match="turn off cutmix or the teacher cache"):
        method.cache_teacher(data, tmp_path)
    plain = MEALV2(small_net(0), small_net(1), views=2)
    plain.cache_teacher(data, tmp_path)
    both = MEALV2(small_net(0), plain.teachers, cutmix=True)
    with pytest.raises(InputError, match="turn off cutmix or the teacher cache"):
        both(data.fetch(torch.arange(4), 0))


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(InputError, match="hard_label_weight to 0"):
        MEALV2.Config.make(cutmix=True, hard_label_weight=1.0)
    with pytest.raises(InputError, match="adversarial must be"):
        MEALV2.Config.make(adversarial="gan")
    with pytest.raises(InputError, match="channels, height, width"):
        MEALV2(small_net(0), small_net(1), cutmix=True)(torch.zeros(4, 16))


def test_published_values_are_presets() -> None:
    paper, official = MEALV2.Config.make("paper"), MEALV2.Config.make("official")
    assert (paper.lr, paper.epochs, paper.batch_size, paper.weight_decay) == (0.01, 180, 512, 0)
    assert paper.discriminator_weight == official.discriminator_weight == 1
    assert (paper.adversarial, official.adversarial) == ("min_max", "official")
    optimised = MEALV2(small_net(0), small_net(1), paper.replace(steps=180)).optimisers(180)["student"]
    assert optimised.scheduler is not None
    rates = []
    for _ in range(180):
        rates.append(optimised.optimizer.param_groups[0]["lr"])
        optimised.optimizer.step()
        optimised.scheduler.step()
    assert rates[:100] == pytest.approx([0.01] * 100) and rates[100:] == pytest.approx([0.001] * 80)


def test_cached_teachers_say_the_same(tmp_path: Path) -> None:
    data = small_data()
    for choice in ("ensemble", "random"):
        live = MEALV2(small_net(0), [small_net(1), small_net(2)], teacher_choice=choice, views=2)
        kept = MEALV2(small_net(0), [small_net(1), small_net(2)], teacher_choice=choice, views=2)
        kept.load_state_dict(live.state_dict())
        kept.cache_teacher(data, tmp_path)
        batch = data.fetch(torch.arange(10), 1)
        for _ in range(2):
            torch.manual_seed(7)
            expected = live(batch)
            torch.manual_seed(7)
            assert torch.allclose(kept(batch), expected, atol=1e-6)


# ---- compressed labels -------------------------------------------------------------------------------------------------

ROW = [0.5, 0.05, 0.3, 0.11, 0.04]


def test_compression_by_hand() -> None:
    p = torch.tensor([ROW], dtype=torch.float64)
    rest = (1 - 0.8) / 3
    assert compress_top_k(p, 2)[0].tolist() == pytest.approx([0.5, rest, 0.3, rest, rest])
    assert compress_top_k(p, 2, "renormalise")[0].tolist() == pytest.approx([0.625, 0, 0.375, 0, 0])
    assert compress_top_k(p, 1, "renormalise")[0].tolist() == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("compression", ["marginal", "renormalise"])
def test_compression_keeps_sums_order_and_everything_for_all_classes(compression: Any) -> None:
    p = (torch.randn(50, 3, 12, dtype=torch.float64) * 3).softmax(-1)
    for k in (1, 4, 11):
        kept = compress_top_k(p, k, compression)
        assert torch.allclose(kept.sum(-1), torch.ones(50, 3, dtype=torch.float64))
        assert (kept >= 0).all() and torch.equal(kept.argmax(-1), p.argmax(-1))
        assert torch.equal(kept.topk(k, -1).indices, p.topk(k, -1).indices)
    assert torch.equal(compress_top_k(p, 12, compression), p)


@pytest.mark.parametrize("k", [0, 6])
def test_compression_names_a_wrong_k(k: int) -> None:
    with pytest.raises(InputError, match=f"the 5 classes \\(got {k}\\)"):
        compress_top_k(torch.tensor([ROW]), k)


def test_stored_labels_are_the_target_and_what_the_discriminator_sees() -> None:
    method, batch = make(compress_top_k=2, compression="renormalise")
    losses = method.losses(batch)
    target = torch.stack([random_logits(m + 1).softmax(-1) for m in range(M)]).mean(0)
    target = compress_top_k(target, 2, "renormalise")
    expected = -(target * random_logits(0).log_softmax(-1)).sum(-1).mean()
    assert losses["similarity"].item() == pytest.approx(expected.item(), rel=1e-10)
    assert method.discriminator is not None
    scores = method.discriminator(torch.cat([random_logits(0).softmax(-1), target]))
    wanted = torch.tensor([[1.0, 0.0]] * B + [[0.0, 1.0]] * B, dtype=torch.float64)
    assert losses["discriminator"].item() == pytest.approx(
        F.binary_cross_entropy_with_logits(scores, wanted).item(), rel=1e-10
    )


# ---- as a plain object -------------------------------------------------------------------------------------------------


def test_a_bare_loop_improves_the_student_without_labels() -> None:
    teachers = [small_net(m + 1, 32) for m in range(2)]
    student = small_net(0)
    keys = list(student.state_dict())
    method = MEALV2(student, teachers)
    before = copy.deepcopy([t.state_dict() for t in teachers])
    optimizer = torch.optim.Adam(method.trainable_parameters(), lr=0.01)
    x = torch.randn(64, 1, 4, 4)
    method.train()
    first = method.losses(Batch(x))["similarity"].item()
    for _ in range(60):
        optimizer.zero_grad()
        method(x).backward()
        optimizer.step()
    assert method.losses(Batch(x))["similarity"].item() < first - 0.05
    assert list(student.state_dict()) == keys
    for teacher, state in zip(teachers, before, strict=True):
        assert not teacher.training
        assert all(torch.equal(v, state[k]) for k, v in teacher.state_dict().items())


def test_the_number_of_classes_is_found_or_asked_for() -> None:
    conv = nn.Sequential(nn.Conv2d(1, C, 4), nn.Flatten())
    with pytest.raises(InputError, match="give num_classes"):
        MEALV2(conv, small_net(1))
    x = torch.randn(4, 1, 4, 4)
    assert torch.isfinite(MEALV2(conv, small_net(1), num_classes=C)(x))
    assert torch.isfinite(MEALV2(conv, small_net(1), adversarial="none")(x))
    with pytest.raises(InputError, match=r"\(B, 7\), not \(8, 5\)"):
        MEALV2(conv, small_net(1), num_classes=7)(x)
    hugging = small_net(0)
    hugging.config = type("Config", (), {"num_labels": C})()
    hugging.extra = nn.Linear(2, 99)
    assert MEALV2(hugging, small_net(1)).discriminator.num_classes == C


def test_teacher_and_student_with_other_classes_are_refused() -> None:
    with pytest.raises(InputError, match="classes"):
        MEALV2(Fixed(random_logits(0)), Fixed(random_logits(1)[:, :3]), adversarial="none")(torch.zeros(B, 1))


def test_each_part_has_its_optimiser() -> None:
    method = MEALV2(small_net(0), small_net(1), lr=0.1, discriminator_lr=0.02)
    made = method.optimisers(10)
    assert made["student"].parameters() == list(method.student.parameters())
    assert made["discriminator"].parameters() == list(method.discriminator.parameters())
    assert [m.optimizer.param_groups[0]["lr"] for m in made.values()] == [0.1, 0.02]
    alike = MEALV2(small_net(0), small_net(1), lr=0.1).optimisers(10)
    assert [m.optimizer.param_groups[0]["lr"] for m in alike.values()] == [0.1, 0.1]
    assert all(m.optimizer.param_groups[0]["weight_decay"] == 0 for m in alike.values())
    assert set(MEALV2(small_net(0), small_net(1), adversarial="none").optimisers(10)) == {"student"}


# ---- stages ------------------------------------------------------------------------------------------------------------


def build(**settings: Any) -> MEALV2:
    student, teachers = small_net(0), [small_net(1, 16), small_net(2, 24)]
    torch.manual_seed(11)
    return MEALV2(student, teachers, **{"steps": 24, "batch_size": 8, "lr": 0.01, **settings})


def test_a_student_of_ones_own_is_taken_as_it_is() -> None:
    assert [s.name for s in build().stages(small_data())] == ["distillation"]
    stages = build(student_epochs=4.0).stages(small_data())
    assert [(s.name, s.steps) for s in stages] == [("student", 20), ("distillation", 24)]
    made = stages[0].optimisers()["student"].optimizer.param_groups[0]
    assert (made["initial_lr"], made["weight_decay"]) == (1e-2, 1e-4)
    with pytest.raises(InputError, match="student_epochs=0"):
        build(student_epochs=4.0).stages(small_data(labels=False))


def test_the_first_stage_is_cross_entropy_and_spares_the_discriminator() -> None:
    method = build(student_epochs=2.0)
    discriminator, student = copy.deepcopy(method.discriminator), copy.deepcopy(method.student)
    stage = method.stages(small_data())[0]
    batch = small_data().fetch(torch.arange(8), 0)
    assert set(stage.losses(batch)) == {"ce"}
    Engine(None, EngineConfig(progress=False)).run(method, [stage])
    assert all(
        torch.equal(a, b) for a, b in zip(discriminator.parameters(), method.discriminator.parameters(), strict=True)
    )
    assert any(not torch.equal(a, b) for a, b in zip(student.parameters(), method.student.parameters(), strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"student_epochs": 5.0},
        {"student_epochs": 5.0, "cutmix": True, "teacher_choice": "random", "adversarial": "official"},
        {"accumulate": 2, "optimizer": "sgd", "compress_top_k": 2},
    ],
)
def test_resumes_exactly_after_a_crash(tmp_path: Path, settings: dict[str, Any]) -> None:
    """The crash at step 7 is in the first stage, and so is the one at 19 where that stage has 25 steps."""
    resumed_equals_uninterrupted(lambda: build(**settings), small_data(), tmp_path)


def test_resumes_exactly_when_stopped_in_either_stage(tmp_path: Path) -> None:
    settings = EngineConfig(progress=False, log_every=4, checkpoint_seconds=1000)

    def make_method() -> MEALV2:
        return build(student_epochs=4.0, cutmix=True)

    whole = make_method()
    Engine(tmp_path / "whole", settings, seed=1).run(whole, whole.stages(small_data()))

    def stop_at(step: int) -> Callable[[int], None]:
        return lambda done: os.kill(os.getpid(), signal.SIGINT) if done == step else None

    for stage_number, step, says in ((0, 9, "step 9 of stage 'student'"), (1, 13, "step 13 of stage 'distillation'")):
        method = make_method()
        stages = method.stages(small_data())
        stages[stage_number].after_step = stop_at(step)
        with pytest.raises(Interrupted, match=says):
            Engine(tmp_path / "broken", settings, seed=1).run(method, stages, resume=True)
    method = make_method()
    Engine(tmp_path / "broken", settings, seed=1).run(method, method.stages(small_data()), resume=True)
    expected, found = whole.training_state(), method.training_state()
    assert all(torch.equal(v, found["tensors"][k]) for k, v in expected["tensors"].items())
    assert expected["counters"] == found["counters"]
    assert lines(tmp_path / "whole") == lines(tmp_path / "broken")
    assert {row["stage"] for row in lines(tmp_path / "whole")} == {"student", "distillation"}


# ---- by name, and on own modules ---------------------------------------------------------------------------------------


def test_fit_on_own_modules_and_unlabelled_inputs(tmp_path: Path) -> None:
    conv = nn.Sequential(nn.Conv2d(1, C, 4), nn.Flatten())  # shows its number of classes nowhere
    keys = set(conv.state_dict())
    run = limbeck.fit(
        "meal-v2",
        torch.randn(40, 1, 4, 4),
        student=conv,
        teacher=[small_net(1), small_net(2)],
        steps=6,
        out=tmp_path / "run",
        engine={"progress": False},
    )
    assert run.method.discriminator.num_classes == C
    assert [row["stage"] for row in run.rows] == ["distillation"]
    from safetensors.torch import load_file

    assert set(load_file(tmp_path / "run" / "artifact" / "model.safetensors")) == keys


def test_fit_needs_both_networks() -> None:
    for given in ({"student": small_net(0)}, {"teacher": small_net(1)}):
        missing = "teacher" if "student" in given else "student"
        with pytest.raises(InputError, match=f"needs {missing}="):
            limbeck.fit("meal-v2", torch.randn(8, 1, 4, 4), **given)


@pytest.mark.filterwarnings("ignore:teacher .* accuracy")  # one epoch teaches them little
def test_by_name_trains_the_student_first_and_asks_three_teachers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("limbeck.tasks.teachers.MIN_STEPS", 1)
    settings = {"task": "digits", "train_size": 100, "teacher_epochs": 1, "student_epochs": 2, "steps": 4}
    quiet = {"progress": False}
    run = limbeck.fit("meal-v2", out=tmp_path / "run", engine=quiet, evaluations=1, **settings)
    method = run.method
    assert len(method.teachers) == 3 and len({m.limbeck_name for m in method.teachers.models}) == 3
    assert {row["stage"] for row in run.rows} == {"student", "distillation"}
    assert [row["who"] for row in run.result["rows"]] == ["student", "teacher 1", "teacher 2", "teacher 3"]
    # One seed fixes everything, and the default is written down as the number that it stands for.
    again = limbeck.fit("meal-v2", engine=quiet, evaluations=1, **settings).method
    assert all(torch.equal(a, b) for a, b in zip(method.parameters(), again.parameters(), strict=True))
    task = load_task(MEALV2.Setup.make(train_size=100))
    setup = MEALV2.Setup.make(train_size=100, teacher_epochs=1)
    default = MEALV2.on_task(task, setup, MEALV2.Config.make(), progress=False)
    assert default.config.student_epochs == 40
    torch.manual_seed(99)  # the caller's random state plays no part in the initialisation
    other = MEALV2.on_task(task, setup, MEALV2.Config.make(), progress=False)
    assert all(torch.equal(a, b) for a, b in zip(default.parameters(), other.parameters(), strict=True))
