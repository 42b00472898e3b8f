"""Tasks of generation, their teachers, and what a run by name builds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from limbeck.core.errors import InputError, UnknownNameError
from limbeck.diffusion.schedules import EDM, Flow
from limbeck.tasks.base import TaskConfig, load_task
from limbeck.tasks.diffusion_teachers import diffusion_teacher, reference_schedule, training_times
from limbeck.tasks.generation import from_images, load_generation
from limbeck.tasks.generators import GeneratorSetup, load_generator, read_prompts

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def test_digits_lie_between_minus_one_and_one() -> None:
    task = load_generation(TaskConfig())
    x = task.train.fetch(torch.arange(1000), None).inputs
    assert x.shape == (1000, 1, 8, 8) and float(x.min()) == -1 and float(x.max()) == 1
    assert task.sigma_data == pytest.approx(float(x.std()), abs=1e-4)
    assert torch.equal(task.train.fetch(torch.arange(5), 3).inputs, x[:5])  # no augmentation
    assert len(task.conditions) == 1000 and task.num_classes == 10


@pytest.mark.parametrize(("name", "modes", "classes"), [("ring", 8, 8), ("grid", 16, None), ("classes-2d", 18, 6)])
def test_mixtures_are_samples_of_their_law(name: str, modes: int, classes: int | None) -> None:
    task = load_generation(TaskConfig(task=name))
    assert task.exact is not None and len(task.exact.module.means) == modes and task.num_classes == classes
    x = task.train.inputs
    means = task.exact.module.means
    nearest = torch.cdist(x, means).min(1).values
    # the distance to its mean has the expectation std sqrt(pi / 2); overlapping modes make it a little less
    expected = task.exact.module.std * (torch.pi / 2) ** 0.5
    assert 0.75 * expected < float(nearest.mean()) < 1.05 * expected
    assert torch.equal(x, load_generation(TaskConfig(task=name)).train.inputs)
    assert not torch.equal(task.val.inputs[:100], task.test.inputs[:100])


def test_tables_are_no_images() -> None:
    with pytest.raises(InputError, match="holds no images to generate"):
        load_generation(TaskConfig(task="wine"))


def test_the_judge_sees_images_as_it_was_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    from limbeck.tasks import teachers

    monkeypatch.setattr(teachers, "MIN_STEPS", 150)
    image_task = load_task(TaskConfig(augment=False))
    image_task.teacher_epochs = 8
    task = from_images(image_task)
    judge = task.classifier(progress=False)
    assert judge is not None and task.classifier() is judge
    x = task.test.fetch(torch.arange(100), None).inputs
    own = image_task.test.fetch(torch.arange(100), None).inputs
    assert torch.allclose(judge.prepared(x), own, atol=1e-4)
    labels = task.test.labels[:100]
    assert float((judge(x).argmax(1) == labels).float().mean()) > 0.8
    assert judge.features(x).shape[0] == 100
    distance = task.perceptual(progress=False)
    assert distance is not None and float(distance(x[:4], x[:4])) == 0 and float(distance(x[:4], x[4:8])) > 0


def test_a_teacher_is_trained_once_and_leaves_the_random_state_alone() -> None:
    task = load_generation(TaskConfig(task="classes-2d"))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    made = diffusion_teacher(task, "flow", network="mlp-w16-b1", steps=60, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    again = diffusion_teacher(task, "flow", network="mlp-w16-b1", steps=60, progress=False)
    for a, b in zip(made.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert made.null_cond is not None and int(made.null_cond) == 6
    other = diffusion_teacher(task, "edm", network="mlp-w16-b1", steps=5, progress=False)
    assert other.precond == "edm" and other.sigma_data == pytest.approx(task.sigma_data)


def test_training_brings_a_teacher_near_to_the_exact_one() -> None:
    task = load_generation(TaskConfig(task="ring"))
    made = diffusion_teacher(task, "flow", network="mlp-w32-b2", steps=600, progress=False)
    fresh = diffusion_teacher(task, "flow", network="mlp-w32-b2", steps=1, progress=False)
    exact = task.exact_teacher(Flow())
    x0, labels = task.test.inputs[:500], task.test.labels[:500]
    t = torch.linspace(0.1, 0.9, 500)
    x_t = Flow().add_noise(x0, torch.randn_like(x0), t)
    wanted = exact.predict(x_t, t, labels, "flow")
    error, first = ((d.predict(x_t, t, labels, "flow") - wanted).square().mean() for d in (made, fresh))
    assert float(error) < 0.1 * float(first)


def test_schedules_of_teachers() -> None:
    made = reference_schedule("edm")
    assert isinstance(made, EDM) and (made.t_min, made.t_max) == (0.02, 20.0)
    drawn = training_times(made)(1000)
    assert float(drawn.min()) > 0.0199 and float(drawn.max()) < 20.001
    with pytest.raises(UnknownNameError, match="vp-cosin'; did you mean vp-cosine"):
        reference_schedule("vp-cosin")


def test_what_a_run_by_name_refuses(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one teacher is distilled"):
        load_generator(GeneratorSetup(teacher=("a", "b")))
    with pytest.raises(InputError, match="--teacher"):
        load_generator(GeneratorSetup(prompts="p.txt"))
    with pytest.raises(InputError, match="a prompt on each line"):
        read_prompts(str(tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(InputError, match="holds no prompt"):
        read_prompts(str(tmp_path / "empty.txt"))
    (tmp_path / "two.txt").write_text("a red cat\n\n  a blue cat \n")
    assert read_prompts(str(tmp_path / "two.txt")) == ["a red cat", "a blue cat"]


def test_an_exact_teacher_by_name() -> None:
    teacher, task = load_generator(GeneratorSetup(task="ring", teacher_network="exact", noise_schedule="edm"))
    assert teacher.schedule == EDM(0.02, 20.0) and task.name == "ring"
