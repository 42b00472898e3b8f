"""What the claims of the ``datasets`` family share: how an arm distils, and what its result is worth.

Every result is judged alike: fresh networks, the same for all arms of a seed, are trained on it from scratch at each of a few
learning rates; validation data chooses the rate (for every arm by itself, baselines included), and the networks trained at
that rate are tested once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from limbeck import catalogue
from limbeck.blocks.diffaug import DiffAug
from limbeck.blocks.ensembles import Recipe
from limbeck.claims.base import Outcome
from limbeck.claims.models import common as models
from limbeck.core.data import Augmentation, mix_seed
from limbeck.core.distilled import DistilledDataset
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.seeding import seed_everything
from limbeck.tasks.base import Task
from limbeck.tasks.judging_datasets import Factory, everything, train_networks

QUIET = EngineConfig(progress=False, log_every=1000)
RATES = (0.01, 0.03, 0.1)
task, available = models.task, models.available


def distil(method: str, on: Task, config: Mapping[str, Any], seed: int, **setup: Any) -> Any:
    """Run a catalogue method on a task, quietly and in memory, and return it.

    Two calls with the same seed and ipc start from the same real images and see the same real batches.
    """
    cls: Any = catalogue.get(method).load()
    made = cls.on_task(on, cls.Setup.make(**setup), cls.Config.make(**config), seed=seed, progress=False)
    return run(made, on, seed)


def run(made: Any, on: Task, seed: int) -> Any:
    """Run a method that is built already, quietly and in memory, and return it."""
    seed_everything(mix_seed(seed, 3))
    made.prepare_run(on.train, on.val, None)
    Engine(None, QUIET, seed=mix_seed(seed, 2)).run(made, made.stages(on.train, on.val, seed=seed))
    return made


def chosen_at_random(on: Task, factory: Factory, ipc: int, seed: int) -> DistilledDataset:
    """Random real images, ``ipc`` of each class."""
    made: Any = catalogue.get("dm").load()
    host = made(on.train, factory, ipc=1, seed=seed)
    return host.as_dataset(
        *host.real_samples(host.classes.sample(ipc, torch.Generator().manual_seed(mix_seed(seed, 37))))
    )


def worth(
    dataset: DistilledDataset,
    on: Task,
    factory: Factory,
    seed: int,
    *,
    steps: int = 300,
    networks: int = 3,
    rates: Sequence[float] = RATES,
    batch_size: int = 128,
    augment: Augmentation | None = None,
    prepare: Any = None,
    **more: float,
) -> Outcome:
    """Validation and test accuracy of networks trained on a data set.

    Args:
        dataset: what to train on, as it is stored.
        on: the task it stands for.
        factory: builds the networks.
        seed: fixes their initial weights, orders and augmentation.
        steps, batch_size: of each training.
        networks: how many, trained together; their mean counts.
        rates: learning rates to choose from on validation data; a rate that was distilled with the data is tried beside them.
        augment: None: crops.
        prepare: (data) -> (inputs, labels) in the space of the data set; None: as the task has them.
        more: further test measures to record.
    """
    read = everything if prepare is None else prepare
    augment = DiffAug("crop") if augment is None else augment
    own = dataset.recipe.get("lr")
    best = None
    for rate in dict.fromkeys([*rates, *([float(own)] if own is not None else [])]):
        trained = train_networks(
            dataset, factory, Recipe(steps, batch_size, rate), seeds=networks, seed=mix_seed(seed, 7), augment=augment
        )
        val = fmean(trained.accuracies(*read(on.val)))
        if best is None or val > best[0]:
            best = (val, rate, trained)
    assert best is not None
    val, rate, trained = best
    test = fmean(trained.accuracies(*read(on.test)))
    return Outcome({"accuracy": val}, {"accuracy": test, "lr": rate, **more})
