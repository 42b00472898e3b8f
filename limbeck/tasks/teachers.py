"""Reference teachers: trained once for a task, then kept in the cache folder by content hash."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn

from limbeck import networks
from limbeck.core.artifacts import WEIGHTS, load_weights, save_weights
from limbeck.core.batch import Batch, Losses, call_model, logits_of
from limbeck.core.data import Data, Stream, mix_seed
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.files import write_json
from limbeck.core.method import Method
from limbeck.core.optim import TrainingConfig, make_optimised
from limbeck.core.seeding import preserved_random_state, seed_everything
from limbeck.core.stage import Stage
from limbeck.tasks.base import Task, cache_folder, hash_of

RECIPE = 2  # part of the cache key: raise it when the way teachers are trained changes
MIN_STEPS = 1000
"""A small training set gets more passes, until it comes to so many updates: an untrained teacher helps nobody."""


class ReferenceTraining(Method):
    """Cross-entropy training of one network, by the engine (so it shows progress and survives being killed)."""

    name = "teacher"

    class Config(TrainingConfig):
        """AdamW with a cosine schedule and a short warm-up."""

    def __init__(self, network: nn.Module, config: Any = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        self.network = network

    def losses(self, batch: Batch) -> Losses:
        return Losses(ce=F.cross_entropy(logits_of(call_model(self.network, batch.inputs)), as_labels(batch.labels)))

    def stage(self, data: Data, seed: int) -> Stage:
        stream = Stream(data, self.config.batch_size, seed=seed)
        steps = max(self.config.total_steps(stream.steps_per_epoch), MIN_STEPS)
        return Stage(
            "training",
            steps,
            stream,
            losses=self.losses,
            optimisers=lambda: {"main": make_optimised(self.trainable_parameters(), self.config, steps)},
        )


def as_labels(labels: Tensor | None) -> Tensor:
    assert labels is not None
    return labels


def reference_teacher(
    task: Task, network: str | None = None, *, seed: int = 0, epochs: float | None = None, progress: bool = True
) -> nn.Module:
    """A network trained on the task's training part, from the cache where it is there.

    The random state of the caller is left alone, so a run does not depend on whether its teacher came from the cache.

    Args:
        task: what to learn.
        network: a network's name; the task's own teacher if None.
        seed: seeds initialisation and training.
        epochs: passes over the training data; the task's own number if None. Never fewer than 1,000 updates.
        progress: show a bar while training.

    Returns:
        the network in evaluation mode.
    """
    name = network or task.networks["teacher"]
    epochs = task.teacher_epochs if epochs is None else epochs
    key = hash_of(RECIPE, task.fingerprint, name, seed, epochs)
    folder = cache_folder() / "teachers" / f"{task.name}-{name.replace(':', '_').replace('.', '_')}-{key}"
    with preserved_random_state():
        seed_everything(mix_seed(seed, 101))
        model = networks.build(name, in_shape=task.in_shape, num_classes=task.num_classes)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with alone(folder):
            if not (folder / WEIGHTS).exists():
                training = ReferenceTraining(model, epochs=epochs, warmup=0.1, lr=5e-3, weight_decay=0.01)
                engine = Engine(folder, EngineConfig(progress=progress), seed=mix_seed(seed, 103))
                engine.run(training, [training.stage(task.train, seed)], resume=True)
                save_weights(model.cpu(), folder / WEIGHTS)
                write_json(
                    folder / "about.json", {"task": task.describe(), "network": name, "seed": seed, "epochs": epochs}
                )
                (folder / "checkpoint.pt").unlink(missing_ok=True)
        load_weights(model, folder / WEIGHTS)
    return model.eval()


def alone(folder: Path) -> AbstractContextManager[Any]:
    """Unrelated processes that want the same teacher wait for the one that trains it; those of one launch train it together."""
    if torch.distributed.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return nullcontext()
    return FileLock(f"{folder}.lock")


@torch.no_grad()
def predictions(model: Callable[[Any], Any], data: Any, batch_size: int = 512) -> tuple[Tensor, Tensor]:
    """Logits (N, C) and labels (N,) of a model on all of a data set, on the CPU; the model's mode is left as it is."""
    device = (
        next(model.parameters()).device
        if isinstance(model, nn.Module) and any(True for _ in model.parameters())
        else None
    )
    logits, labels = [], []
    for batch in data.batches(batch_size):
        batch = batch if device is None else batch.to(device)
        logits.append(logits_of(call_model(model, batch.inputs)).float().cpu())
        labels.append(as_labels(batch.labels).cpu())
    return torch.cat(logits), torch.cat(labels)
