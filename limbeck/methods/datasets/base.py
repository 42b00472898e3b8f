"""The contract of the ``datasets`` family: real samples in, a few samples out, judged by the networks that train on them."""

from __future__ import annotations

import base64
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.adapters.distilled import save_distilled
from limbeck.blocks import coresets
from limbeck.blocks.class_batches import ClassIndex
from limbeck.blocks.diffaug import OPERATIONS, DiffAug
from limbeck.blocks.formation import Formation, MultiFormation, identity
from limbeck.blocks.zca import ZCA
from limbeck.core.batch import Batch, first_tensor
from limbeck.core.data import Data, TensorData, as_data, mix_seed
from limbeck.core.distilled import DistilledDataset, Kind, real_bytes
from limbeck.core.errors import InputError
from limbeck.core.method import Method
from limbeck.core.optim import Optimised
from limbeck.core.seeding import preserved_random_state
from limbeck.core.stage import Stage
from limbeck.networks.fresh import Factory, default_network, factory_of, name_of, network_factory
from limbeck.tasks.base import Task, TaskConfig, load_task
from limbeck.tasks.judging_datasets import MOST_BYTES, JudgingConfig, everything, judge_datasets
from limbeck.tasks.sheets import distilled_sheet


class DatasetDistiller(Method):
    """Base of the methods whose product is a data set.

    Args:
        data: real training data with one integer class for each sample: tensors ``(x, y)``, or what
            :func:`limbeck.core.data.as_data` takes. Its augmentation is not used.
        network: the architecture to distil with: a function that builds a network with new weights, or a module (its weights do
            not matter: it is copied and drawn anew).
        config: hyper-parameters; or give single ones as keyword arguments.
        seed: of every choice made at construction, such as which real samples to start from.
        class_names: one for each class, for the record.

    Raises:
        InputError: labels that are no classes, one class only, more samples per class asked for than there are.
    """

    family = "datasets"

    class Config(JudgingConfig):
        """What the whole family has."""

        ipc: int = Field(10, ge=1, description="samples per class to distil into (images per class)")

    class Setup(TaskConfig):
        """What a run by name builds."""

        network: str | None = Field(
            None,
            description="network to distil with, or package.module:factory; none: a small ConvNet that fits the images",
        )

    def __init__(
        self,
        data: Any,
        network: Factory | nn.Module | None,
        config: Config | None = None,
        *,
        seed: int = 0,
        class_names: Sequence[str] = (),
        **overrides: Any,
    ) -> None:
        super().__init__(config, **overrides)
        self.real: Data = as_data(data)
        self.seed, self.class_names = seed, list(class_names)
        self.classes = self.find_classes()
        self.factory = None if network is None else factory_of(network)
        sample = self.real.fetch(torch.arange(1), None).inputs
        if isinstance(sample, Tensor):  # a wrong name is refused now, and not after distilling
            for name in self.config.judge_networks:
                network_factory(name, tuple(sample.shape[1:]), self.num_classes)
        self.network_name = name_of(network)

    def find_classes(self) -> ClassIndex:
        """The real samples by class, checked against what is asked."""
        found = ClassIndex(self.real.labels_tensor())
        found.check(self.config.ipc)
        return found

    @property
    def num_classes(self) -> int:
        return self.classes.num_classes

    def fresh_network(self) -> nn.Module:
        """A network with new weights from torch's random state, frozen, in training mode, on the method's device.

        Raises:
            InputError: the method was made without a network.
        """
        if self.factory is None:
            raise InputError(f"{self.name} needs network=… (a module, or a function that builds one)")
        network = self.factory().to(self.device)
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        return network.train()

    @property
    def device(self) -> torch.device:
        found = next(self.parameters(), None)
        return torch.device("cpu") if found is None else found.device

    # ---- what a method gives -----------------------------------------------------------------------------------------

    def distilled(self) -> DistilledDataset:
        """The data set as it is now, as it comes back from the disk."""
        raise NotImplementedError(f"{type(self).__name__} defines no distilled data set")

    # ---- building ----------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> tuple[Self, Task]:
        """The method on a task, and the task."""
        task = load_task(setup)
        return cls.on_task(task, setup, config, seed=seed, progress=progress), task

    @classmethod
    def on_task(cls, task: Task, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> Self:
        """The method for a task that is already loaded."""
        name = setup.network or default_network(task.in_shape)
        make = network_factory(name, task.in_shape, task.num_classes)
        return cls(task.train, make, config, seed=seed, class_names=task.class_names)

    @classmethod
    def from_data(cls, data: Data, student: Any, teacher: Any, config: Any, *, seed: int = 0) -> Self:
        """The method on a user's own data; ``student`` is the network to distil with."""
        if student is None and cls.needs_network:
            raise InputError(
                f"{cls.name} needs student=… (a module, or a function that builds one: what is to learn from the result)"
            )
        return cls(data, student, config, seed=seed)

    needs_network: ClassVar[bool] = True
    """False if data can be distilled without a network; one is then only needed to judge."""

    def stages(self, train: Data, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """The loops of a run."""
        raise NotImplementedError(f"{type(self).__name__} defines no stages")

    def prepare_run(self, train: Data, val: Data | None, setup: Any = None) -> None:
        """Last preparations before a run; may take long, and must be able to go on after being killed."""

    def check(self, batch: Batch) -> None:
        """Dry run before a run; nothing is changed.

        Raises:
            InputError: something would fail at the first step.
        """

    # ---- judging and keeping the result ------------------------------------------------------------------------------

    def contestants(self) -> dict[str, DistilledDataset]:
        """The data sets to be judged, the distilled one first; soft and hard labels are contestants apart."""
        made = self.distilled()
        found = {"distilled": made}
        if made.soft:
            found = {"distilled, soft labels": made, "distilled, hard labels": hardened(made)}
        found["random, same bytes"] = self.random_selection(made.nbytes)
        return {**found, **self.whole_contestant()}

    def whole_contestant(self) -> dict[str, DistilledDataset]:
        """The whole set, by its name; nothing where it is not asked for, or does not fit into memory (of which there is a warning)."""
        if not self.config.judge_whole:
            return {}
        sample = first_tensor(self.real.fetch(torch.arange(1), None).inputs)
        size = 0 if sample is None else len(self.real) * sample.numel() * 4
        if size > MOST_BYTES:
            warnings.warn(
                f"the whole set takes {size / 2**30:.0f} GB in memory, so no network is trained on it for comparison",
                stacklevel=2,
            )
            return {}
        return {"whole set": self.whole_set()}

    def random_selection(self, nbytes: int, seed: int = 0) -> DistilledDataset:
        """Real samples, as many of each class, that take no more than ``nbytes`` (at least one of each class)."""
        shape = self.real_samples(torch.zeros(1, dtype=torch.long))[0].shape[1:]
        kind: Kind = "images" if len(shape) == 3 else "vectors"
        each = nbytes // real_bytes(shape, self.num_classes, kind) // self.num_classes
        generator = torch.Generator().manual_seed(mix_seed(self.seed, seed, 31))
        per_class = int(min(max(1, each), int(self.classes.counts.min())))
        ids = self.classes.sample(per_class, generator).flatten()
        return self.as_dataset(*self.real_samples(ids), index=ids)

    def whole_set(self) -> DistilledDataset:
        return self.as_dataset(*everything(self.real))

    def as_dataset(self, inputs: Tensor, labels: Tensor, **more: Any) -> DistilledDataset:
        """Samples in the space of the method's inputs as a data set."""
        kind: Kind = "images" if inputs.ndim == 4 else "vectors"
        mean, std = getattr(self.real, "mean", None), getattr(self.real, "std", None)
        known = {"mean": list(mean), "std": list(std)} if mean is not None and std is not None else {}
        return DistilledDataset(
            inputs,
            labels,
            self.num_classes,
            **{"kind": kind, "bits": 8 if kind == "images" else 32, "class_names": self.class_names, **known, **more},
        )

    def real_samples(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and labels of the real samples with these ids (any shape, flattened)."""
        ids = ids.flatten()
        return self.real.fetch(ids, None).inputs, self.classes.labels[ids]

    def judge_factories(self, sample: Tensor) -> dict[str, Factory]:
        """The networks that are trained on the contestants, by name; the method's own first.

        Args:
            sample: (1, ...) one input.
        """
        shape = tuple(sample.shape[1:])
        if self.config.judge_networks:
            return {n: network_factory(n, shape, self.num_classes) for n in self.config.judge_networks}
        own = default_network(shape)
        first: dict[str, Factory] = (
            {own: network_factory(own, shape, self.num_classes)}
            if self.factory is None
            else {self.network_name: self.factory}
        )
        return {**first, "mlp-128": network_factory("mlp-128", shape, self.num_classes)}

    def judge_augmentation(self) -> DiffAug | None:
        """What augments the samples that networks are trained on when judging."""
        return None

    def prepared_test(self, test: Data) -> tuple[Tensor, Tensor]:
        """Test inputs and labels in the space of the method's inputs."""
        return everything(test)

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """Fresh networks trained on the result, on random samples of the same bytes, and on the whole set."""
        contestants = self.contestants()
        first = next(iter(contestants.values()))
        rows = judge_datasets(
            contestants,
            self.judge_factories(first.inputs[:1]),
            self.prepared_test(test),
            self.config,
            seed=self.seed,
            augment=self.judge_augmentation(),
            device=self.device,
            progress=self.show_progress,
        )
        found: dict[str, Any] = {"rows": rows, "share_of_real_bytes": first.share_of(len(self.real))}
        pictures = self.pictures(first)
        return {**found, "pictures": pictures} if pictures else found

    def pictures(self, made: DistilledDataset) -> list[dict[str, str]]:
        """Sheets for the report: ``title``, ``caption``, ``png``."""
        sheet = distilled_sheet(made)
        if sheet is None:
            return []
        return [{"title": "Distilled images", "caption": f"{len(made)} images; a row for each class.", "png": sheet}]

    def save_artifact(self, folder: Path, description: dict[str, Any]) -> None:
        """The data set as parquet, with a sheet of pictures."""
        made = self.distilled()
        sheet = distilled_sheet(made)
        save_distilled(made, folder, description, None if sheet is None else base64.b64decode(sheet))


class ImageDistiller(DatasetDistiller):
    """Base of the methods that learn the pixels of synthetic images.

    ``images`` (C * ipc, channels, height, width) is the trained parameter, in the space of normalised (and, if asked, whitened)
    real images, sorted by class; ``labels`` (C * ipc,) are its classes. A method's loss reads ``present()``.

    Attributes:
        formation: how stored images become those that a loss sees, beside the ``factor``; plug-ins set it.
        augment: differentiable augmentation.
        zca: the whitening, or None.
    """

    class Config(DatasetDistiller.Config):
        steps: int = Field(300, ge=1, description="updates of the images")
        lr_images: float = Field(1.0, gt=0, description="learning rate of the images (SGD)")
        image_momentum: float = Field(0.5, ge=0, lt=1, description="momentum of the images")
        init: Literal["real", "herding", "noise"] = Field(
            "real",
            description="start from real images of the class, drawn at random or (herding) such that their mean is that of the class, "
            "or from noise",
        )
        diffaug: str = Field(
            "auto",
            description="differentiable augmentation, such as color_crop_cutout_flip_scale_rotate, or none; "
            "auto: all where the task flips its images, else crop",
        )
        factor: int = Field(
            1, ge=1, description="each stored image is a grid of factor x factor smaller ones (multi-formation)"
        )
        zca: bool = Field(False, description="whiten the images (ZCA)")
        bits: Literal[8, 16, 32] = Field(8, description="bits of a stored value")

    images: nn.Parameter
    labels: Tensor

    def __init__(self, data: Any, network: Any, config: Any = None, **options: Any) -> None:
        super().__init__(data, network, config, **options)
        self.augment = DiffAug(self._operations())
        self.zca: ZCA | None = None
        sample = self.real.fetch(torch.arange(1), None).inputs
        if not isinstance(sample, Tensor) or sample.ndim != 4:
            raise InputError(f"{self.name} distils images (N, C, H, W)")
        if self.config.zca:
            raw, labels = everything(self.real)
            self.zca = ZCA.fit(raw)
            self.real = TensorData(self.zca(raw), labels)
        self.decode = MultiFormation(self.config.factor)
        self.formation: Formation = identity
        labels = torch.arange(self.num_classes).repeat_interleave(self.config.ipc)
        self.register_buffer("labels", labels)
        self.images = nn.Parameter(self.initial_images())
        self.decode(self.images.detach()[:1], labels[:1])  # images that cannot be cut are refused here

    def _operations(self) -> str | tuple[str, ...]:
        if self.config.diffaug != "auto":
            return str(self.config.diffaug)
        flips = bool(getattr(getattr(self.real, "augment", None), "flip", False))
        return OPERATIONS if flips else ("crop",)

    def initial_images(self) -> Tensor:
        """(C * ipc, ...) what distillation starts from."""
        generator = torch.Generator().manual_seed(mix_seed(self.seed, 23))
        f = self.config.factor
        ids = self.classes.sample(self.config.ipc * f * f, generator)
        if self.config.init == "herding":
            ids = torch.stack(
                [self._representative(label, self.config.ipc * f * f) for label in range(self.num_classes)]
            )
        real: Tensor = self.real.fetch(ids.flatten(), None).inputs
        if self.config.init == "noise":
            return torch.randn(self.num_classes * self.config.ipc, *real.shape[1:], generator=generator)
        if f == 1:
            return real.clone()
        return tiled(real, f)

    def _representative(self, label: int, count: int) -> Tensor:
        """Ids of images of one class whose mean is near to that of the class; the same again where it has fewer."""
        ids = self.classes.ids(label)
        pixels = self.real.fetch(ids, None).inputs.flatten(1)
        chosen = ids[coresets.herding(pixels, min(count, len(ids)))]
        return chosen[torch.arange(count) % len(chosen)]

    def present(self) -> tuple[Tensor, Tensor]:
        """All synthetic images and labels as the loss sees them, before augmentation."""
        images, labels = self.decode(self.images, self.labels)
        return self.formation(images, labels)

    def optimisers(self, steps: int) -> Mapping[str, Optimised]:
        """SGD over the images."""
        sgd = torch.optim.SGD([self.images], lr=self.config.lr_images, momentum=self.config.image_momentum)
        return {"images": Optimised(sgd)}

    def check(self, batch: Batch) -> None:
        """One loss on a small batch of every class: finite, and with a gradient to the images and to nothing else.

        Raises:
            InputError: it is not.
        """
        if type(self).losses is Method.losses:
            return
        generator = torch.Generator().manual_seed(0)
        ids = self.classes.sample(2, generator).flatten()
        with preserved_random_state():
            losses = self.losses(self.real.fetch(ids, None).to(self.device))
        for name, value in losses.items():
            if not bool(torch.isfinite(value)):
                raise InputError(f"loss term '{name}' is {value.item()} on the first batch: check inputs and settings")
        (gradient,) = torch.autograd.grad(losses.total, self.images, allow_unused=True)
        if gradient is None:
            raise InputError("no gradient reaches the images: does the network's forward detach?")

    def product(self) -> tuple[Tensor, Tensor]:
        """The images and labels that are the result."""
        return self.images.detach(), self.labels

    def distilled(self) -> DistilledDataset:
        return self.as_product(*self.product())

    def as_product(self, images: Tensor, labels: Tensor) -> DistilledDataset:
        """Images and labels as a data set, as it comes back from the disk."""
        made = self.as_dataset(
            images.cpu().clone(),
            labels.cpu().clone(),
            bits=self.config.bits,
            factor=self.config.factor,
            recipe=self.recipe(),
        )
        return made.stored()

    def as_dataset(self, inputs: Tensor, labels: Tensor, **more: Any) -> DistilledDataset:
        """As in the family; whatever is trained on whitened images needs the whitening, which counts for every contestant."""
        return super().as_dataset(inputs, labels, **{"extra_bytes": self._whitening_bytes, **more})

    def random_selection(self, nbytes: int, seed: int = 0) -> DistilledDataset:
        return super().random_selection(nbytes - self._whitening_bytes, seed)

    @property
    def _whitening_bytes(self) -> int:
        return 0 if self.zca is None else self.zca.nbytes

    def recipe(self) -> dict[str, Any]:
        """What the data set says about training on it."""
        return {}

    def judge_augmentation(self) -> DiffAug | None:
        return self.augment if self.augment.operations else None

    def prepared_test(self, test: Data) -> tuple[Tensor, Tensor]:
        inputs, labels = everything(test)
        return (inputs if self.zca is None else self.zca(inputs)), labels


def hardened(made: DistilledDataset) -> DistilledDataset:
    """The same samples with hard labels."""
    return replace(made, labels=made.hard_labels, recipe={k: v for k, v in made.recipe.items() if k != "temperature"})


def tiled(images: Tensor, factor: int) -> Tensor:
    """Images (N * factor^2, C, H, W) made smaller and put together, ``factor`` x ``factor`` of them in one: (N, C, H, W)."""
    n, channels, height, width = images.shape
    if height % factor or width % factor:
        raise InputError(f"images of {height}x{width} pixels cannot be cut into {factor}x{factor} equal parts")
    small = torch.nn.functional.adaptive_avg_pool2d(images, (height // factor, width // factor))
    grid = small.view(n // factor**2, factor, factor, channels, height // factor, width // factor)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(n // factor**2, channels, height, width)
