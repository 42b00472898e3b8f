"""Methods inside a transformers Trainer, and transformers models in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

transformers = pytest.importorskip("transformers")

import limbeck
from limbeck.adapters.transformers import DistillationTrainer
from limbeck.blocks.projectors import make_projector
from limbeck.core.batch import Batch, Losses
from limbeck.core.errors import InputError
from limbeck.losses.features import hint
from limbeck.methods.models import KD
from limbeck.networks.artifacts import save_model


def bert(width: int) -> Any:
    torch.manual_seed(width)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config)


class Sentences(Dataset[dict[str, torch.Tensor]]):
    """The label is the class of the first word."""

    def __init__(self, n: int = 64) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, 50, (n, 8), generator=generator)
        self.labels = self.ids[:, 0] % 3

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "attention_mask": torch.ones(8, dtype=torch.long), "labels": self.labels[i]}


def arguments(folder: Path, **more: Any) -> Any:
    defaults: dict[str, Any] = {
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "report_to": [],
        "use_cpu": True,
        "logging_steps": 4,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }
    return transformers.TrainingArguments(str(folder), **{**defaults, **more})


def test_the_trainer_minimises_the_methods_loss(tmp_path: Path) -> None:
    student, teacher = bert(8), bert(16)
    method = KD(student, teacher, temperature=2.0)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    data = Sentences()
    batch = torch.utils.data.default_collate([data[i] for i in range(32)])
    first = method(batch).item()
    trainer = DistillationTrainer(method, args=arguments(tmp_path), train_dataset=data, eval_dataset=data)
    trainer.train()
    assert method(batch).item() < first
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert any("kd" in entry and "ce" in entry for entry in trainer.state.log_history)
    assert trainer.evaluate()["eval_loss"] > 0


class Hinted(KD):
    """KD with a projected hint: has something to train besides the student."""

    def __init__(self, student: nn.Module, teacher: nn.Module, **settings: Any) -> None:
        super().__init__(student, teacher, teacher_taps=["bert.pooler"], **settings)
        self.projector = make_projector((2, 8), (2, 16))

    def losses(self, batch: Batch) -> Losses:
        pooled = self.student.bert(**{k: v for k, v in batch.inputs.items()}).pooler_output
        return (
            super().losses(batch).add("hint", hint(self.projector(pooled), self.teach(batch).features["bert.pooler"]))
        )


def test_projectors_are_trained_and_not_saved(tmp_path: Path) -> None:
    student = bert(8)
    method = Hinted(student, bert(16))
    before = [p.clone() for p in method.projector.parameters()]
    trainer = DistillationTrainer(method, args=arguments(tmp_path), train_dataset=Sentences())
    trainer.train()
    assert all(not torch.equal(a, b) for a, b in zip(before, method.projector.parameters(), strict=True))
    trainer.save_model(str(tmp_path / "student"))
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "student")
    assert set(again.state_dict()) == set(student.state_dict())


def test_a_pretrained_student_is_an_artifact_of_its_own_library(tmp_path: Path) -> None:
    student = bert(8).eval()
    save_model(student, tmp_path, {"method": "kd"})
    for again in (
        limbeck.load(tmp_path).content,
        transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval(),
    ):
        x = torch.arange(1, 9)[None]
        torch.testing.assert_close(again(input_ids=x).logits, student(input_ids=x).logits)


def test_a_method_without_a_student_is_refused() -> None:
    from limbeck.core.method import Method

    with pytest.raises(InputError, match="no student"):
        DistillationTrainer(Method())
