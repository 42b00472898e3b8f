"""Dense reference models are trained once, pre-trained ones shared, and come back to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from limbeck.tasks import language_teachers
from limbeck.tasks.base import TaskConfig, load_task
from limbeck.tasks.language_teachers import dense_teacher, language_teacher


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path))
    for name in ("PRETRAINING_STEPS", "TUNING_STEPS", "STEPS"):
        monkeypatch.setattr(language_teachers, name, 3)


def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    stage = language_teachers.TokenTraining.stage

    def noted(self, name, data, seed):
        seen.append(name)
        return stage(self, name, data, seed)

    monkeypatch.setattr(language_teachers.TokenTraining, "stage", noted)
    return seen


def test_pre_training_is_shared_and_everything_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = trainings(monkeypatch)
    task = load_task(TaskConfig.make(task="stdlib-text"))
    before = torch.random.get_rng_state()
    first = language_teacher(task, "gpt-d16-l1-h2", seed=1, pretrain_seed=0, progress=False)
    assert seen == ["pre-training", "fine-tuning"] and not first.training
    other = language_teacher(task, "gpt-d16-l1-h2", seed=2, pretrain_seed=0, progress=False)
    assert seen == ["pre-training", "fine-tuning", "fine-tuning"]
    again = language_teacher(task, "gpt-d16-l1-h2", seed=1, pretrain_seed=0, progress=False)
    assert len(seen) == 3
    assert torch.equal(before, torch.random.get_rng_state())
    states = [m.state_dict() for m in (first, other, again)]
    assert all(torch.equal(v, states[2][k]) for k, v in states[0].items())
    assert not all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_tasks_without_other_text_are_trained_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = trainings(monkeypatch)
    tags = load_task(TaskConfig.make(task="stdlib-tokens", train_size=2000))
    found = dense_teacher(tags, "berttagger-d16-l1-h2-v97", seed=0, epochs=2, progress=False)
    assert seen == ["training"]
    assert found(tags.test.fetch(torch.arange(2), None).inputs["input_ids"]).logits.shape == (2, 64, 7)
