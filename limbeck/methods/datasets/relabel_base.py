"""What methods share that squeeze data into a classifier and let it label what they make."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.blocks.class_batches import ClassIndex
from limbeck.blocks.diffaug import OPERATIONS, DiffAug
from limbeck.blocks.soft_label_store import label_bytes, write_labels
from limbeck.blocks.view_labelers import Labeler, OnlineLabeler, ViewPolicy
from limbeck.blocks.view_training import ViewRecipe
from limbeck.blocks.views import RandomView
from limbeck.core.batch import call_model, logits_of
from limbeck.core.data import Data, TensorData, mix_seed
from limbeck.core.distilled import DistilledDataset
from limbeck.core.errors import InputError
from limbeck.core.method import fingerprint
from limbeck.methods.datasets.base import DatasetDistiller, default_network, network_factory
from limbeck.networks.artifacts import save_model
from limbeck.tasks.base import Task
from limbeck.tasks.judging_views import judge_on_views
from limbeck.tasks.teachers import predictions, reference_teacher


class RelabelDistiller(DatasetDistiller):
    r"""Base of the methods whose images are labelled by a frozen teacher that was trained on the real data.

    Labels are of one of four kinds. ``hard``: the classes. ``static``: one soft label for each image,
    :math:`\mathrm{softmax}(z/T)` of the teacher's logits z on the stored image, or of their mean over several views.
    ``online`` and ``stored``: a label for each view that a student sees, :math:`\mathrm{KL}` at temperature T without the factor
    T², by the teacher at that moment, or read from a store that is written with the artifact. Every kind of soft label is judged
    beside as many random real images with labels of the same kind by the same teacher: the labels alone carry a good part of
    what is learnt.

    A method defines :meth:`made`.

    Args:
        data: real data; for judging, for the class count, and for the range of pixels.
        network: what students are in judging; None: a small ConvNet.
        teacher: the classifier. Frozen in place.
        config, seed, class_names: see the family.
    """

    class Config(DatasetDistiller.Config):
        labels: Literal["static", "hard", "online", "stored"] = Field(
            "static", description="a fixed soft label for each image, its class, or a label for every view"
        )
        label_views: int = Field(
            0, ge=0, description="views whose logits are averaged to a static label; 0: the image itself"
        )
        temperature: float = Field(1.5, gt=0, description="softens teacher and student")
        mix: Literal["none", "cutmix", "mixup"] = Field("cutmix", description="how views are mixed (online, stored)")
        student_crop: float = Field(
            0.7,
            gt=0,
            le=1,
            description="smallest area share of a student's view, and of what a reference teacher is trained on",
        )
        student_epochs: int = Field(150, ge=1, description="passes of students over views (online, stored)")
        student_batch_size: int = Field(64, ge=1, description="views per update of a student")
        student_lr: float = Field(2e-3, gt=0, description="peak learning rate of a student on views (AdamW, cosine)")
        student_decay: float = Field(0.01, ge=0, description="weight decay of a student on views")

    class Setup(DatasetDistiller.Setup):
        """What a run by name builds."""

        teacher: tuple[str, ...] = Field(
            (),
            description="network to squeeze the data into, or package.module:factory with its weights loaded; none: a ConvNet with batch normalisation",
        )
        teacher_epochs: float | None = Field(
            None, gt=0, description="passes over the data to train it; none: the task's"
        )

    needs_network = False
    teacher: nn.Module

    def __init__(
        self,
        data: Any,
        network: Any,
        teacher: nn.Module | None = None,
        config: Any = None,
        *,
        seed: int = 0,
        class_names: Sequence[str] = (),
        **overrides: Any,
    ) -> None:
        super().__init__(data, network, config, seed=seed, class_names=class_names, **overrides)
        if not isinstance(teacher, nn.Module):
            raise InputError(f"{self.name} needs teacher=… (a trained classifier, as an nn.Module)")
        sample = self.real.fetch(torch.arange(1), None).inputs
        if not isinstance(sample, Tensor) or sample.ndim != 4:
            raise InputError(f"{self.name} makes images (channels, height, width)")
        self.shape = tuple(sample.shape[1:])
        self.flip = flip_of(self.real)
        self.add_frozen("teacher", teacher)

    def find_classes(self) -> ClassIndex:
        return ClassIndex(self.real.labels_tensor())  # images are made, so there may be more of them than there were

    def made(self) -> DistilledDataset:
        """The images as they come back from the disk, with their classes."""
        raise NotImplementedError(f"{type(self).__name__} defines no images")

    # ---- building ----------------------------------------------------------------------------------------------------

    @classmethod
    def on_task(cls, task: Task, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> Self:
        make = network_factory(setup.network or default_network(task.in_shape), task.in_shape, task.num_classes)
        name = setup.teacher[0] if setup.teacher else f"{default_network(task.in_shape)}-batch"
        teacher = squeezed(task, name, config.student_crop, epochs=setup.teacher_epochs, progress=progress)
        return cls(task.train, make, teacher, config, seed=seed, class_names=task.class_names)

    @classmethod
    def from_data(cls, data: Data, student: Any, teacher: Any, config: Any, *, seed: int = 0) -> Self:
        return cls(data, student, teacher, config, seed=seed)

    def prepare_run(self, train: Data, val: Data | None, setup: Any = None) -> None:
        """Warns of a teacher that is no better than chance."""
        if val is None:
            return
        logits, labels = predictions(self.teacher, val)
        accuracy = float((logits.argmax(1) == labels).double().mean())
        chance = float(torch.bincount(labels).max() / len(labels))
        if accuracy <= chance + 2 * (chance * (1 - chance) / len(labels)) ** 0.5:
            warnings.warn(
                f"the teacher has {accuracy:.1%} accuracy on validation data, no better than always guessing one class "
                f"({chance:.1%}): check its weights, normalisation and class order",
                stacklevel=2,
            )

    # ---- relabel -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def ask(self, images: Tensor) -> Tensor:
        """The teacher's logits (n, C) on images, on the CPU."""
        parts = [logits_of(call_model(self.teacher, x.to(self.device))).float().cpu() for x in images.split(512)]
        return torch.cat(parts)

    def static_labels(self, images: Tensor) -> Tensor:
        """(n, C) probabilities at the temperature: of the images themselves, or of the mean logits over ``label_views`` views."""
        count = self.config.label_views
        if count:
            policy = self.policy("none")
            everyone = torch.arange(len(images))
            views = (policy.show(images, policy.plan(epoch, len(images)), everyone) for epoch in range(count))
            logits = torch.stack([self.ask(v) for v in views]).mean(0)
        else:
            logits = self.ask(images)
        return torch.softmax(logits / self.config.temperature, 1)

    def relabelled(self, made: DistilledDataset) -> DistilledDataset:
        """A data set of images with the teacher's static labels."""
        labels = self.static_labels(made.inputs).half().float()
        return replace(made, labels=labels, recipe={**made.recipe, "temperature": self.config.temperature})

    def policy(self, mix: Literal["none", "cutmix", "mixup"] | None = None) -> ViewPolicy:
        """The views that students are shown."""
        view = RandomView((self.config.student_crop, 1.0), flip=self.flip)
        return ViewPolicy(view, mix or self.config.mix, seed=mix_seed(self.seed, 37))

    def labeler(self, images: Tensor) -> OnlineLabeler:
        """Views of images, labelled by the teacher at that moment."""
        return OnlineLabeler(self.teacher, images.to(self.device), self.policy())

    def student_recipe(self) -> ViewRecipe:
        c = self.config
        return ViewRecipe(c.student_epochs, c.student_batch_size, c.student_lr, c.student_decay, c.temperature)

    def label_cost(self, count: int) -> int:
        """Bytes that labels of views of ``count`` images need: those of the store, or those of the teacher that must be kept."""
        if self.config.labels == "stored":
            return label_bytes(self.config.student_epochs, count, self.num_classes, self.policy())
        state = self.teacher.state_dict().values()
        return sum(t.numel() * t.element_size() for t in state) if self.config.labels == "online" else 0

    # ---- judging and keeping the result ------------------------------------------------------------------------------

    def distilled(self) -> DistilledDataset:
        made = self.made()
        if self.config.labels == "static":
            return self.relabelled(made)
        return replace(made, extra_bytes=made.extra_bytes + self.label_cost(len(made)))

    def contestants(self) -> dict[str, DistilledDataset]:
        made = self.made()
        found = {"distilled, hard labels": made}
        if self.config.labels == "static":
            real = self.as_random(len(made))
            found = {
                "distilled, soft labels": self.distilled(),
                **found,
                "random, teacher's labels": self.relabelled(real),
            }
        found["random, same bytes"] = self.random_selection(next(iter(found.values())).nbytes)
        return {**found, **self.whole_contestant()}

    def as_random(self, count: int) -> DistilledDataset:
        """``count`` random real images, as many of each class (one at least); classes with fewer repeat theirs."""
        generator = torch.Generator().manual_seed(mix_seed(self.seed, 39))
        ids = self.classes.sample(max(1, count // self.num_classes), generator).flatten()
        return self.as_dataset(*self.real_samples(ids), index=ids)

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """As in the family; with labels of views, two rows more: students on views of the images, and of random real ones."""
        found = super().evaluate(test, class_names)
        if self.config.labels in ("online", "stored"):
            found["rows"] = self.judge_views(test) + found["rows"]
        return found

    def judge_views(self, test: Data) -> list[dict[str, Any]]:
        """Students trained on views with the teacher's label of each."""
        made = self.distilled()
        sets = {"distilled, labels of views": made, "random, labels of views": self.as_random(len(made))}
        with tempfile.TemporaryDirectory() as folder:
            contestants: dict[str, tuple[Labeler, int]] = {}
            for number, (who, images) in enumerate(sets.items()):
                labeler: Labeler = self.labeler(images.inputs)
                nbytes = made.nbytes
                if self.config.labels == "stored":
                    labeler = self.store(Path(folder) / str(number), images.inputs)
                    nbytes += labeler.nbytes - self.label_cost(len(made))  # with the headers of the files
                contestants[who] = (labeler, nbytes)
            return judge_on_views(
                contestants,
                self.judge_factories(made.inputs[:1]),
                self.prepared_test(test),
                self.student_recipe(),
                seeds=self.config.judge_seeds,
                seed=self.seed,
                device=self.device,
                progress=self.show_progress,
            )

    def store(self, folder: Path, images: Tensor) -> Labeler:
        """Labels of all views that a student will see, written to a folder (and kept there if they are there)."""
        return write_labels(folder, self.labeler(images), self.config.student_epochs, key=fingerprint(self.teacher))

    def judge_augmentation(self) -> DiffAug:
        return DiffAug(OPERATIONS if self.flip else ("crop",))

    def save_artifact(self, folder: Path, description: dict[str, Any]) -> None:
        """The data set, and what labels its views: ``labels/`` with the store, or ``teacher/`` with the teacher."""
        super().save_artifact(folder, description)
        if self.config.labels == "stored":
            self.store(folder / "labels", self.made().inputs)
        elif self.config.labels == "online":
            save_model(self.teacher, folder / "teacher", {"role": "labels views of the images"})


def squeezed(
    task: Task, name: str, lowest: float, *, seed: int = 0, epochs: float | None = None, progress: bool = True
) -> nn.Module:
    """A classifier trained on the task, from the cache where it is there.

    Where the task augments its images, the teacher is trained on resized crops instead, and flips if the task flips: on views as
    students will see and it will label (as published, where both see crops from 8 % on).

    Args:
        task: what to squeeze.
        name: of the network; with a colon, a factory whose weights are loaded already.
        lowest: smallest area share of a crop.
        seed: of the teacher's initialisation and training.
        epochs: passes over the data.
        progress: show a bar while training.
    """
    if ":" in name:
        return network_factory(name, task.in_shape, task.num_classes)()
    train = task.train
    if isinstance(train, TensorData) and train.augment is not None and len(task.in_shape) == 3:
        view = RandomView((lowest, 1.0), flip=flip_of(train))
        seen = TensorData(train.inputs, train.labels, mean=train.mean, std=train.std, augment=view, seed=train.seed)
        task = replace(task, train=seen)
    return reference_teacher(task, name, seed=seed, epochs=epochs, progress=progress)


def flip_of(data: Data) -> float:
    """Probability of mirroring an image: 1/2 where the data's own augmentation mirrors, else 0 (digits, text)."""
    return 0.5 if getattr(getattr(data, "augment", None), "flip", False) else 0.0
