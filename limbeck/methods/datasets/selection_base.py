"""What methods share that choose real samples: how many of each class, the features that they compare, a step for each class."""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck import networks
from limbeck.blocks import coresets
from limbeck.blocks.class_batches import ClassIndex
from limbeck.blocks.diffaug import OPERATIONS, DiffAug
from limbeck.blocks.embeddings import embed, gradient_embedding, penultimate, raw_pixels
from limbeck.core.batch import Batch
from limbeck.core.data import Data, mix_seed
from limbeck.core.distilled import DistilledDataset
from limbeck.core.errors import InputError
from limbeck.core.stage import Stage, Stepper
from limbeck.methods.datasets.base import DatasetDistiller, default_network, network_factory
from limbeck.networks.base import Network
from limbeck.tasks.base import Task
from limbeck.tasks.teachers import reference_teacher

UNFINISHED = -1


class SelectionDistiller(DatasetDistiller):
    """Base of the methods that choose real samples; :attr:`chosen` holds their ids, in no particular order."""

    needs_network = False
    chosen: Tensor

    def __init__(self, data: Any, network: Any = None, config: Any = None, **options: Any) -> None:
        super().__init__(data, network, config, **options)
        self.register_buffer("chosen", torch.zeros(0, dtype=torch.long))

    def distilled(self) -> DistilledDataset:
        """The chosen samples.

        Raises:
            InputError: nothing was chosen yet.
        """
        if not len(self.chosen):
            raise InputError(f"{self.name} has chosen nothing yet: run its stages (limbeck.fit) first")
        ids = self.chosen.cpu()
        return self.as_dataset(*self.real_samples(ids), index=ids)

    def judge_augmentation(self) -> DiffAug | None:
        sample = self.real.fetch(torch.arange(1), None).inputs
        flips = bool(getattr(getattr(self.real, "augment", None), "flip", False))
        return DiffAug(OPERATIONS if flips else ("crop",)) if sample.ndim == 4 else None


class Selection(SelectionDistiller):
    """Base: real samples, ``ipc`` of each class, or a ``ratio`` of all.

    Attributes:
        counts: (C,) how many of each class.
        chosen: (Σ counts,) their ids, class by class; -1 where nothing was chosen yet.
    """

    class Config(SelectionDistiller.Config):
        ratio: float | None = Field(
            None, gt=0, le=1, description="keep this part of all samples, in proportion to the classes, instead of ipc"
        )

    def __init__(self, data: Any, network: Any = None, config: Any = None, **options: Any) -> None:
        super().__init__(data, network, config, **options)
        how_many = {"ipc": self.config.ipc} if self.config.ratio is None else {"ratio": self.config.ratio}
        generator = torch.Generator().manual_seed(mix_seed(self.seed, 71))
        self.counts = coresets.class_counts(self.classes.labels, generator=generator, **how_many)
        self.chosen = torch.full((int(self.counts.sum()),), UNFINISHED)

    def find_classes(self) -> ClassIndex:
        if self.config.ratio is None:
            return super().find_classes()
        return ClassIndex(self.real.labels_tensor())

    # ---- choosing ----------------------------------------------------------------------------------------------------

    def choose(self, label: int, count: int) -> Tensor:
        """Ids (count,) of one class."""
        raise NotImplementedError(f"{type(self).__name__} defines no choice")

    def choose_class(self, label: int) -> None:
        """Fill in one class's part of :attr:`chosen`."""
        count = int(self.counts[label])
        start = int(self.counts[:label].sum())
        if count:
            self.chosen[start : start + count] = self.choose(label, count).to(self.chosen.device)

    def select(self) -> DistilledDataset:
        """Choose without the engine, and give what was chosen."""
        for label in range(self.num_classes):
            self.choose_class(label)
        return self.distilled()

    def stages(self, train: Data | None = None, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """One stage with a step for each class; what is chosen depends on the method's own seed alone."""
        return [Stage("selection", self.num_classes, update=self.update)]

    def update(self, batch: Batch | None, stepper: Stepper) -> dict[str, Tensor]:
        self.choose_class(stepper.step)
        return {"chosen": (self.chosen != UNFINISHED).sum()}

    # ---- results -----------------------------------------------------------------------------------------------------

    def distilled(self) -> DistilledDataset:
        """The chosen samples.

        Raises:
            InputError: not all were chosen yet.
        """
        if bool((self.chosen == UNFINISHED).any()):
            raise InputError(f"{self.name} has not chosen yet: run its stages (limbeck.fit), or select()")
        return super().distilled()

    def random_selection(self, nbytes: int, seed: int = 0) -> DistilledDataset:
        """The comparison: under a ratio, random samples in the same proportions."""
        if self.config.ratio is None:
            return super().random_selection(nbytes, seed)
        generator = torch.Generator().manual_seed(mix_seed(self.seed, seed, 31))
        ids = coresets.random_selection(self.classes.labels, self.counts, generator)
        return self.as_dataset(*self.real_samples(ids), index=ids)


class EmbeddingSelection(Selection):
    """Base: samples are compared by what an encoder makes of them.

    Args:
        data, network, config, seed, class_names: see the family; the network only judges.
        encoder: a network whose features are compared: a classifier (the input of its last linear layer counts), or any module that
            gives features. It is frozen in place, and must not have seen test data.
        embeddings: (N, e) of your own instead.

    Raises:
        InputError: no encoder where one is needed, or embeddings that are not as many as the samples.
    """

    class Config(Selection.Config):
        embedding: Literal["auto", "features", "gradients", "pixels"] = Field(
            "auto",
            description="what samples are compared by: features of the encoder, loss gradients at its last layer, or raw pixels; "
            "auto: features, or pixels without an encoder",
        )
        layer: str | None = Field(
            None, description="path of the layer whose output is the feature; none: what the encoder's head takes"
        )
        double_softmax: bool = Field(
            False, description="gradients of the cross-entropy of softmax outputs, as in the code of DQ's authors"
        )

    class Setup(Selection.Setup):
        """What a run by name builds."""

        encoder: str | None = Field(
            None,
            description="network that is trained on the training data to give features, or package.module:factory with its weights "
            "loaded; none: a small ConvNet that fits",
        )
        encoder_epochs: float | None = Field(
            None, gt=0, description="passes over the data to train it; none: the task's"
        )

    encoder: nn.Module | None

    def __init__(
        self,
        data: Any,
        network: Any = None,
        encoder: nn.Module | None = None,
        config: Any = None,
        *,
        embeddings: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(data, network, config, **options)
        if encoder is None:
            self.encoder = None
        elif isinstance(encoder, nn.Module):
            self.add_frozen("encoder", encoder)
        else:
            raise InputError(f"the encoder must be an nn.Module, not {type(encoder).__name__}")
        if embeddings is not None and (embeddings.ndim != 2 or len(embeddings) != len(self.real)):
            raise InputError(
                f"embeddings are one row per sample: {len(self.real)} samples, embeddings {tuple(embeddings.shape)}"
            )
        if embeddings is None and encoder is None and self.config.embedding in ("features", "gradients"):
            raise InputError(
                f"embedding '{self.config.embedding}' needs encoder=… (a trained network); 'pixels' does without"
            )
        self._embeddings = embeddings
        self._centre: Tensor | None = None

    @classmethod
    def on_task(cls, task: Task, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> Self:
        make = network_factory(setup.network or default_network(task.in_shape), task.in_shape, task.num_classes)
        encoder = cls.encoder_for(task, setup, progress) if cls.wants_encoder(config) else None
        return cls(task.train, make, encoder, config, seed=seed, class_names=task.class_names)

    @classmethod
    def wants_encoder(cls, config: Any) -> bool:
        return bool(config.embedding != "pixels")

    @classmethod
    def encoder_for(cls, task: Task, setup: Any, progress: bool) -> nn.Module:
        """The encoder of a run by name: it learns from the task's training part alone, and is kept in the cache."""
        name = setup.encoder or default_network(task.in_shape)
        if ":" in name:
            return networks.build(name, in_shape=task.in_shape, num_classes=task.num_classes)
        return reference_teacher(task, name, epochs=setup.encoder_epochs, progress=progress)

    @classmethod
    def from_data(cls, data: Data, student: Any, teacher: Any, config: Any, *, seed: int = 0) -> Self:
        return cls(data, student, teacher, config, seed=seed)

    def embeddings(self) -> Tensor:
        """(N, e) of all samples, on the CPU; computed once."""
        if self._embeddings is None:
            self._embeddings = self.embed(self.real)
        return self._embeddings

    def embed(self, data: Any) -> Tensor:
        """(M, e) of any samples in the way of :meth:`embeddings`; raw pixels are centred by the mean of the training data.

        Raises:
            InputError: a model that has no linear layer to take features of, or no such layer.
        """
        c, model = self.config, self.encoder
        if model is None or c.embedding == "pixels":
            if self._centre is None:
                self._centre = raw_pixels(self.real, centred=False).mean(0)
            return raw_pixels(data, centred=False) - self._centre
        if c.embedding == "gradients":
            return gradient_embedding(model, data, double_softmax=c.double_softmax, head=self.features_of(model))
        return embed(model, data, layer=self.features_of(model))

    def features_of(self, model: nn.Module) -> Any:
        """Which layer gives the features; None: what the model is asked for by itself."""
        if self.config.layer is not None:
            return self.config.layer
        if isinstance(model, Network):
            return penultimate(model) if self.config.embedding == "gradients" else None
        heads = [part for part in model.modules() if isinstance(part, nn.Linear)]
        return penultimate(model) if heads and heads[-1].out_features == self.num_classes else None
