"""The ground that the claims about masked autoencoders share: images of which few have labels, one pre-trained teacher, equal budgets."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor, nn

from limbeck import networks
from limbeck.claims.base import Outcome
from limbeck.claims.models import common
from limbeck.core.artifacts import load_weights, save_weights
from limbeck.core.data import mix_seed
from limbeck.core.engine import Engine
from limbeck.core.seeding import preserved_random_state, seed_everything
from limbeck.methods.models import dmae, g2sd
from limbeck.methods.models import masked as base
from limbeck.methods.models.base import make_network
from limbeck.methods.models.dmae import DMAE
from limbeck.methods.models.masked import MaskedDistiller
from limbeck.tasks.base import Task, cache_folder, hash_of

RATES = ({"finetune_lr": 1e-3}, {"finetune_lr": 3e-3}, {"finetune_lr": 1e-2})
DECODER: dict[str, Any] = {"teacher_decoder_width": 32, "teacher_decoder_depth": 2}


@dataclass(frozen=True)
class Ground:
    """What all arms share. Hashable, so that what is made from it is made once per process."""

    data_root: str | None
    on_mnist: bool
    teacher_epochs: float
    student_epochs: float
    finetune_steps: int
    labelled: int

    @property
    def task(self) -> Task:
        if self.on_mnist:
            return common.task(self.data_root, "mnist", 4000, image_size=28, augment=False, labelled=self.labelled)
        return common.task(None, "digits", None, augment=False, labelled=self.labelled)

    @property
    def patch(self) -> int:
        return 4 if self.on_mnist else 2

    @property
    def teacher_name(self) -> str:
        return f"maevit-d64-l6-h4-p{self.patch}"

    def student_name(self, token: bool = False) -> str:
        return f"{'distvit' if token else 'maevit'}-d24-l4-h4-p{self.patch}"

    @property
    def common(self) -> dict[str, Any]:
        """Settings of every arm."""
        return {
            "epochs": self.student_epochs,
            "finetune_steps": self.finetune_steps,
            "finetune_batch_size": 32,
            "evaluations": 0,
        }


def ground_for(data_root: str | None) -> Ground:
    """4,000 images of MNIST where it is given, 100 of them with labels; else the digits."""
    if common.available("mnist", data_root):
        return Ground(data_root, True, teacher_epochs=60, student_epochs=16, finetune_steps=400, labelled=100)
    return Ground(None, False, teacher_epochs=150, student_epochs=60, finetune_steps=400, labelled=100)


@functools.lru_cache(maxsize=2)
def teacher(ground: Ground) -> tuple[nn.Module, nn.Module]:
    """A masked autoencoder pre-trained on all training images, and its decoder, from the cache folder where they are there."""
    task = ground.task
    key = hash_of(1, task.fingerprint, ground.teacher_name, ground.teacher_epochs)
    folder = cache_folder() / "teachers" / f"{task.name}-masked-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    with preserved_random_state():
        model = make_network(ground.teacher_name, task, 51)
        method = _pretraining(model, make_network(ground.student_name(), task, 0), ground.teacher_epochs)
        assert method.teacher_decoder is not None
        parts = {"encoder": model, "decoder": method.teacher_decoder}
        with FileLock(folder / "lock"):
            if not all((folder / f"{name}.safetensors").exists() for name in parts):
                Engine(None, common.QUIET, seed=91).run(method, method.stages(task.train, None, seed=91)[:1])
                for name, part in parts.items():
                    save_weights(part, folder / f"{name}.safetensors")
        for name, part in parts.items():
            load_weights(part, folder / f"{name}.safetensors")
    return model.eval(), method.teacher_decoder.eval()


def kept(ground: Ground, what: str, seed: int, make: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """Weights of a student before its last stage, from the cache folder where they are there: every candidate starts from them.

    Args:
        ground, what, seed: what they are; the key, with the source of everything that makes them.
        make: trains the student.
    """
    sources = [inspect.getsource(module) for module in (base, dmae, g2sd, sys.modules[__name__])]
    path = (
        cache_folder()
        / "claims"
        / f"masked-{what}-{seed}-{hash_of(ground.task.fingerprint, ground, what, seed, *sources)}.safetensors"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            save_weights(make(), path)
    return load_file(path)


def _pretraining(model: nn.Module, other: nn.Module, epochs: float) -> DMAE:
    with preserved_random_state():
        seed_everything(53)
        return DMAE(other, model, pretrained=False, teacher_epochs=epochs, evaluations=0, **DECODER)


@functools.lru_cache(maxsize=2)
def tuned_teacher(ground: Ground) -> nn.Module:
    """The teacher fine-tuned on the labelled images, at the learning rate of three that is best on validation data."""

    def make() -> nn.Module:
        found = []
        for settings in RATES:
            model = make_network(ground.teacher_name, ground.task, 51)
            model.load_state_dict(teacher(ground)[0].state_dict())
            finetune(model, ground, {**settings, "finetune_steps": 2 * ground.finetune_steps}, seed=93)
            found.append((common.measures(model, ground.task, "val")["accuracy"], model))
        return max(found, key=lambda pair: pair[0])[1]

    model = make_network(ground.teacher_name, ground.task, 51)
    model.load_state_dict(kept(ground, "tuned-teacher", 93, make))
    return model.eval()


def finetune(model: nn.Module, ground: Ground, settings: Mapping[str, Any], seed: int) -> None:
    """Fine-tune a classifier in place on the labelled images, as every arm does."""
    with preserved_random_state():
        seed_everything(mix_seed(seed, 4))
        # the method's own last stage; its distillation is not run
        method = DMAE(model, make_network(ground.student_name(), ground.task, 1), **{**ground.common, **settings})
    Engine(None, common.QUIET, seed=mix_seed(seed, 2)).run(
        method, method.finetuning_stages(ground.task.train, None, seed)
    )


def pretrained_alone(ground: Ground, seed: int, token: bool = False) -> nn.Module:
    """A student pre-trained as a masked autoencoder by itself, for as many epochs as the others are distilled."""
    student = make_network(ground.student_name(token), ground.task, seed)
    with preserved_random_state():
        seed_everything(mix_seed(seed, 4))
        other = networks.build(ground.student_name(), in_shape=ground.task.in_shape, num_classes=2)
        method = DMAE(student, other, **{**ground.common, "feature_weight": 0.0})
    distil(method, ground, seed)
    return student


def distil(method: MaskedDistiller, ground: Ground, seed: int) -> None:
    """The stage without labels of a method whose teachers are trained."""
    stages = [s for s in method.stages(ground.task.train, None, seed=seed) if s.name == method.generic_name]
    Engine(None, common.QUIET, seed=mix_seed(seed, 2)).run(method, stages)


def measured(model: nn.Module, ground: Ground) -> Outcome:
    """Quality on validation and test data."""
    return Outcome(common.measures(model, ground.task, "val"), common.measures(model, ground.task, "test"))
