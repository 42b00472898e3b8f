"""Expert trajectories: networks trained on the real data with a snapshot after every epoch, kept in the cache folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from limbeck.blocks.diffaug import DiffAug
from limbeck.blocks.ensembles import ensemble_gradients, ensemble_logits, networks_at_once
from limbeck.blocks.flat import FlatNetwork
from limbeck.blocks.sharpness import gsam_gradient
from limbeck.blocks.trajectories import ABOUT, TrajectoryBuffer, TrajectoryWriter
from limbeck.core.batch import Batch
from limbeck.core.checkpoint import CHECKPOINT
from limbeck.core.config import Config
from limbeck.core.data import Augmentation, Data, as_data, mix_seed
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError, RunError
from limbeck.core.files import read_json
from limbeck.core.method import Method
from limbeck.core.optim import Optimised
from limbeck.core.seeding import preserved_random_state, seed_everything
from limbeck.core.stage import Stage, Stepper
from limbeck.networks.fresh import Factory
from limbeck.tasks.base import cache_folder, hash_of
from limbeck.tasks.judging_datasets import everything
from limbeck.tasks.teachers import alone, as_labels

RECIPE = 1  # part of the cache key: raise it when the way experts are trained changes


class ExpertConfig(Config):
    """How experts are trained: stochastic gradient descent with a constant rate."""

    experts: int = Field(6, ge=1, description="number of experts K, from different initial weights")
    epochs: int = Field(20, ge=1, description="passes over the real data E; one snapshot each")
    batch_size: int = Field(64, ge=1, description="real samples per update")
    lr: float = Field(0.05, gt=0, description="learning rate (SGD)")
    momentum: float = Field(0.0, ge=0, lt=1, description="momentum (heavy ball)")
    weight_decay: float = Field(0.0, ge=0, description="weight decay, added to the gradient")
    lr_decay: float = Field(1.0, gt=0, le=1, description="multiplies the rate, once, after half of the epochs")
    rho: float = Field(0.0, ge=0, description="radius of flat regions; 0: plain SGD")
    alpha: float = Field(0.3, ge=0, description="weight of the gap between the loss and its maximum in the radius")
    adaptive: bool = Field(True, description="the radius is relative to each parameter's size")
    half: bool = Field(False, description="keep snapshots in 16 bits")

    presets = {"paper": {"experts": 100, "epochs": 50, "batch_size": 256, "lr": 0.01}}


class ExpertTraining(Method):
    """K networks of one architecture, trained together; each has its own initial weights, order of batches and augmentation.

    Experts do not depend on each other: expert k is the same whatever their number (up to rounding).

    Args:
        factory: builds a network with new weights from torch's random state.
        config: see :class:`ExpertConfig`.
        seed: of initial weights, orders and augmentation.
        augment: of training inputs, as they come from the data; drawn anew in every step.

    Attributes:
        network: runs a network with parameters given.
        theta: (K, P), trained.
    """

    name = "experts"

    class Config(ExpertConfig):
        """See :class:`ExpertConfig`."""

    def __init__(
        self,
        factory: Factory,
        config: ExpertConfig | None = None,
        *,
        seed: int = 0,
        augment: Augmentation | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__(config, **overrides)
        self.seed, self.augment = seed, augment
        drawn = []
        with preserved_random_state():
            for number in range(self.config.experts):
                seed_everything(mix_seed(seed, number, 107))
                made = factory()
                if not number:
                    self.network = FlatNetwork(made)
                drawn.append(self.network.flatten(made))
        self.theta = nn.Parameter(torch.stack(drawn))
        self._at_once = len(drawn)
        self._orders: tuple[int, Tensor] | None = None

    def objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of one expert, from its logits (B, C) and labels (B,)."""
        return F.cross_entropy(logits, labels)

    def gradients(self, theta: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (K,) and gradients (K, P), without a graph, on batches x (K, B, ...) and labels (K, B)."""
        return ensemble_gradients(self.network, theta, x, y, self.objective, self._at_once)

    def stage(self, data: Data, keep: Callable[[int, Tensor], None]) -> Stage:
        """The training; ``keep(epoch, theta)`` is called at initialisation and after every epoch."""
        config = self.config
        size = min(config.batch_size, len(data))
        per_epoch = len(data) // size
        late = (config.epochs // 2 + 1) * per_epoch

        def update(_: Batch | None, stepper: Stepper) -> Mapping[str, Tensor]:
            if stepper.step == late and config.lr_decay < 1:
                optimizer.state.clear()  # momentum of the higher rate would carry over
            x, y = self._batch(data, stepper.step, size, per_epoch)
            found = gsam_gradient(
                lambda theta: self.gradients(theta, x, y),
                self.theta.detach(),
                rho=config.rho,
                alpha=config.alpha,
                adaptive=config.adaptive,
            )
            stepper.minimise((self.theta * found.gradient).sum())  # whose gradient is that one
            values = {"loss": found.losses.mean()}
            return {**values, "gap": found.gap.mean()} if config.rho else values

        def after_step(step: int) -> None:
            if step % per_epoch == 0:
                keep(step // per_epoch, self.theta)

        def prepare() -> None:
            self.network.skeleton.to(self.theta.device)
            sample = data.fetch(torch.arange(min(2, len(data))), None).inputs.to(self.theta.device)
            self._at_once = networks_at_once(self.network, self.theta, sample, size)

        optimizer = torch.optim.SGD([self.theta], config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
        schedule = LambdaLR(optimizer, lambda step: config.lr_decay if step >= late else 1.0)
        return Stage(
            "training",
            config.epochs * per_epoch,
            update=update,
            after_step=after_step,
            prepare=prepare,
            begin=lambda: keep(0, self.theta),
            optimisers=lambda: {"main": Optimised(optimizer, schedule)},
        )

    def _batch(self, data: Data, step: int, size: int, per_epoch: int) -> tuple[Tensor, Tensor]:
        """Inputs (K, B, ...) and labels (K, B) of a step, augmented; a function of the seed and the step alone."""
        epoch, position = divmod(step, per_epoch)
        count, device = len(self.theta), self.theta.device
        if self._orders is None or self._orders[0] != epoch:
            orders = [torch.randperm(len(data), generator=self._generator(n, epoch, 53)) for n in range(count)]
            self._orders = (epoch, torch.stack(orders))
        ids = self._orders[1][:, position * size : (position + 1) * size]
        batch = data.fetch(ids.flatten(), None)
        x = batch.inputs.to(device)
        if self.augment is not None:
            drawn = [self._draw(size, self._generator(n, step, 59)) for n in range(count)]
            x = self.augment.apply(x, torch.cat(drawn))
        return x.unflatten(0, ids.shape), as_labels(batch.labels).to(device).unflatten(0, ids.shape)

    def _draw(self, size: int, generator: torch.Generator) -> Tensor:
        """Augmentation of one expert's batch; DiffAug does one operation for the whole of it, as published."""
        if isinstance(self.augment, DiffAug):
            return self.augment.draw(size, generator, shared="op")
        assert self.augment is not None
        return self.augment.draw(size, generator)

    def _generator(self, *numbers: int) -> torch.Generator:
        return torch.Generator().manual_seed(mix_seed(self.seed, *numbers))


def build_experts(
    data: Any,
    factory: Factory,
    config: ExpertConfig | None = None,
    *,
    seed: int = 0,
    augment: Augmentation | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
    training: type[ExpertTraining] = ExpertTraining,
) -> TrajectoryBuffer:
    """Trajectories of experts, trained now or read from where they were kept.

    Training shows progress, and goes on where it was if it is killed. The caller's random state is left alone.

    Args:
        data: real training data with labels; its own augmentation is not used.
        factory: builds a network with new weights.
        config: how to train; the small-scale defaults if None.
        seed: of initial weights, orders and augmentation.
        augment: of training inputs.
        folder: where to keep them; None: in the cache folder, under a hash of everything that they depend on. Data that cannot be
            hashed (a map-style data set) is not cached: its experts are kept in memory.
        progress: show a bar.
        training: another way of training, a subclass.

    Raises:
        RunError: ``folder`` holds experts of other data, networks or settings.
        TrainingDiverged: the rate is too high.
    """
    real: Data = as_data(data)
    config = config or ExpertConfig()
    with preserved_random_state():
        made = training(factory, config, seed=seed, augment=augment)
        content = real.fingerprint()
        key = _key(made, content)
        about = {
            "seed": seed,
            "training": config.model_dump(),
            "data": content,
            "network": type(made.network.skeleton).__name__,
            "key": key,
        }
        settings = EngineConfig(progress=progress)
        if folder is None and content is None:
            kept: list[Tensor] = []
            _train(made, real, None, settings, lambda epoch, theta: kept.append(theta.detach().cpu().clone()))
            return TrajectoryBuffer(list(torch.stack(kept, 1)), about)
        place = cache_folder() / "experts" / key if folder is None else Path(folder).expanduser()
        place.parent.mkdir(parents=True, exist_ok=True)
        with alone(place):
            if not (place / ABOUT).exists():
                count, size = made.theta.shape
                writer = TrajectoryWriter(place, count, config.epochs, size, half=config.half)
                _train(made, real, place, settings, writer.write)
                writer.finish(about)
                (place / CHECKPOINT).unlink(missing_ok=True)
        found = read_json(place / ABOUT)["about"].get("key")
        if found != key:
            raise RunError(
                f"{place} holds experts of other data, networks or settings: choose another folder, or remove it"
            )
    return TrajectoryBuffer.load(place)


def _train(
    made: ExpertTraining, data: Data, place: Path | None, settings: EngineConfig, keep: Callable[[int, Tensor], None]
) -> None:
    Engine(place, settings, seed=mix_seed(made.seed, 109)).run(made, [made.stage(data, keep)], resume=True)


def _key(made: ExpertTraining, content: str | None) -> str:
    """A hash of what experts depend on. The initial weights stand for the network and the seed of its construction."""
    augment = None if made.augment is None else (type(made.augment).__name__, sorted(vars(made.augment).items()))
    skeleton = (repr(made.network.skeleton), made.network.names)
    config = sorted(made.config.model_dump().items())
    return hash_of(RECIPE, type(made).__name__, content, skeleton, config, augment, made.seed, made.theta.detach())


def expert_accuracies(network: FlatNetwork, theta: Tensor, data: Data) -> Tensor:
    """(K,) accuracies of networks with parameters (K, P) on a data set.

    Raises:
        InputError: see :func:`limbeck.tasks.judging_datasets.everything`.
    """
    inputs, labels = everything(data)
    if labels.ndim != 1:
        raise InputError("accuracy needs one class for each sample, and the data has soft labels")
    said = ensemble_logits(network, theta, inputs.to(theta.device)).argmax(-1).cpu()
    return (said == labels).double().mean(1)
