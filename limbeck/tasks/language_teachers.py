"""Dense reference models for language tasks: pre-trained where there is other text of the kind, fine-tuned on the task, and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

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
from limbeck.losses.tokens import token_cross_entropy
from limbeck.tasks.base import Task, cache_folder, hash_of
from limbeck.tasks.language import LanguageTask
from limbeck.tasks.teachers import alone, as_labels, reference_teacher

RECIPE = 1  # part of the cache key: raise it when the way they are trained changes
PRETRAINING_STEPS, TUNING_STEPS, STEPS = 1200, 250, 1500
_SETTINGS: dict[str, Any] = {
    "batch_size": 16,
    "schedule": "linear",
    "warmup": 0.08,
    "weight_decay": 0.01,
    "clip_grad": 1.0,
}


class TokenTraining(Method):
    """Cross-entropy training of one network on tokens."""

    name = "language model"

    class Config(TrainingConfig):
        """AdamW, linear decay after a short warm-up."""

    def __init__(self, network: nn.Module, shift: bool, config: Any = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        self.network, self.shift = network, shift

    def losses(self, batch: Batch) -> Losses:
        logits = logits_of(call_model(self.network, batch.inputs))
        return Losses(ce=token_cross_entropy(logits, as_labels(batch.labels), self.shift))

    def stage(self, name: str, data: Data, seed: int) -> Stage:
        stream = Stream(data, self.config.batch_size, seed=seed)
        return Stage(
            name,
            self.config.steps,
            stream,
            losses=self.losses,
            optimisers=lambda: {"main": make_optimised(self.trainable_parameters(), self.config, self.config.steps)},
        )


def language_teacher(
    task: LanguageTask,
    network: str | None = None,
    *,
    seed: int = 0,
    pretrain_seed: int | None = None,
    steps: int | None = None,
    progress: bool = True,
) -> nn.Module:
    """A dense network that knows a task, from the cache folder where it is there.

    Where the task has other text, it is pre-trained on that for 1,200 updates at 3e-3 (kept apart, so that several fine-tuned ones can share it) and
    fine-tuned for 250 at 1e-3; else it is trained for 1,500 at 3e-3. The random state of the caller is left alone.

    Args:
        task: what to learn.
        network: a network's name; the task's own if None.
        seed: seeds initialisation and training.
        pretrain_seed: seeds those of the pre-training; None: as ``seed``.
        steps: updates on the task; None: as above.
        progress: show a bar while training.

    Returns:
        the network in evaluation mode.
    """
    name = network or task.networks["teacher"]
    shift = task.characters is not None and task.num_classes == len(task.characters)
    first = seed if pretrain_seed is None else pretrain_seed
    steps = steps or (STEPS if task.pretraining is None else TUNING_STEPS)
    with preserved_random_state():
        seed_everything(mix_seed(first, 101))
        model = networks.build(name, in_shape=task.in_shape, num_classes=task.num_classes)
        begun: Any = None
        if task.pretraining is not None:
            begun = (RECIPE, "pretraining", task.pretraining.fingerprint(), name, first, PRETRAINING_STEPS)
            training = TokenTraining(model, shift, steps=PRETRAINING_STEPS, lr=3e-3, **_SETTINGS)
            _trained(training, "pre-training", task, task.pretraining, begun, first, progress)
        key = (RECIPE, "tuning", begun, task.fingerprint, name, seed, steps)
        training = TokenTraining(model, shift, steps=steps, lr=3e-3 if begun is None else 1e-3, **_SETTINGS)
        _trained(training, "training" if begun is None else "fine-tuning", task, task.train, key, seed, progress)
    return model.eval()


def _trained(
    training: TokenTraining, stage: str, task: LanguageTask, data: Data, key: tuple[Any, ...], seed: int, progress: bool
) -> None:
    """Train in place, or fill with the weights that an equal training gave before."""
    folder: Path = cache_folder() / "teachers" / f"{task.name}-{hash_of(*key)}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        if not (folder / WEIGHTS).exists():
            engine = Engine(folder, EngineConfig(progress=progress), seed=mix_seed(seed, 103))
            engine.run(training, [training.stage(stage, data, mix_seed(seed, 107))], resume=True)
            save_weights(training.network.cpu(), folder / WEIGHTS)
            write_json(folder / "about.json", {"task": task.describe(), "stage": stage, "seed": seed})
            (folder / "checkpoint.pt").unlink(missing_ok=True)
    load_weights(training.network, folder / WEIGHTS)


def dense_teacher(task: Task, name: str, *, seed: int, epochs: float | None = None, progress: bool = True) -> nn.Module:
    """The dense model of a task, of language or not, from the cache folder where it is there.

    Args:
        name: of a network.
        epochs: passes over the task's training data; None: the task's own recipe.
    """
    if not isinstance(task, LanguageTask):
        return reference_teacher(task, name, seed=0, epochs=epochs, progress=progress)
    size = min(_SETTINGS["batch_size"], len(task.train))
    steps = None if epochs is None else max(1, round(epochs * (len(task.train) // size)))
    return language_teacher(task, name, seed=seed, steps=steps, progress=progress)
