"""How distilled data sets are judged: fresh networks are trained on them from scratch, and tested on real data.

The protocol is the same for every contestant: the same networks with the same initial weights, the same number of updates and
the same augmentation. Only a learning rate that was distilled with a data set is that data set's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from limbeck.blocks.ensembles import Recipe, ensemble_logits, train_ensemble
from limbeck.blocks.flat import FlatNetwork, draw_flat
from limbeck.blocks.formation import MultiFormation
from limbeck.core.config import Config
from limbeck.core.data import Augmentation, Data, mix_seed
from limbeck.core.distilled import DistilledDataset
from limbeck.core.errors import InputError
from limbeck.core.progress import StageProgress
from limbeck.core.seeding import preserved_random_state, seed_everything
from limbeck.networks.fresh import Factory

MOST_BYTES = 4 << 30
"""Of a data set that is held in memory."""


class JudgingConfig(Config):
    """How the result is judged: networks trained on it from scratch."""

    judge_networks: tuple[str, ...] = Field(
        (), description="networks trained on the result; none: the one it was made with, and an MLP"
    )
    judge_seeds: int = Field(3, ge=1, description="networks of each architecture, from different initial weights")
    judge_steps: int = Field(400, ge=1, description="updates that each of them gets, whatever it is trained on")
    judge_batch_size: int = Field(128, ge=1, description="samples per update")
    judge_lr: float = Field(0.02, gt=0, description="learning rate (SGD with momentum 0.9, divided by 10 halfway)")
    judge_whole: bool = Field(True, description="also train on the whole set")

    def recipe(self, of: Mapping[str, Any]) -> Recipe:
        """The training recipe; a data set's own recipe ``of`` wins where it has a say."""
        own = {k: of[k] for k in ("lr", "momentum", "weight_decay", "optimizer", "milestones") if k in of}
        return Recipe(**{"steps": self.judge_steps, "batch_size": self.judge_batch_size, "lr": self.judge_lr, **own})


class Trained(NamedTuple):
    """Networks of one architecture: the function that runs them, and their parameters (K, P)."""

    network: FlatNetwork
    theta: Tensor

    def accuracies(self, inputs: Tensor, labels: Tensor) -> list[float]:
        """One accuracy for each network, on inputs (M, ...) and labels (M,)."""
        said = ensemble_logits(self.network, self.theta, inputs.to(self.theta.device)).argmax(-1)
        return (said == labels.to(said.device)).double().mean(1).tolist()


def train_networks(
    dataset: DistilledDataset,
    factory: Factory,
    recipe: Recipe,
    *,
    seeds: int,
    seed: int = 0,
    augment: Augmentation | None = None,
    device: torch.device | str = "cpu",
    tick: Callable[[int], None] | None = None,
) -> Trained:
    """Train fresh networks on a data set.

    Args:
        dataset: labels may be soft; then the loss is the cross-entropy at its recipe's ``temperature`` (1 if it has none).
        factory: builds a network with new weights.
        recipe: the training.
        seeds: number of networks; they are trained together, as one ensemble.
        seed: of their initial weights, orders and augmentation.
        augment: of training inputs.
        device: where to train.
        tick: called with the number of updates since the last call.
    """
    temperature = float(dataset.recipe.get("temperature", 1.0))

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits / temperature, labels)

    inputs, labels = dataset.inputs.to(device), dataset.labels.to(device)
    inputs, labels = MultiFormation(dataset.factor)(inputs, labels) if dataset.factor > 1 else (inputs, labels)
    with preserved_random_state():
        seed_everything(mix_seed(seed, 41))
        network, theta = draw_flat(factory, seeds)
    network.skeleton.to(device)
    trained = train_ensemble(
        network,
        theta.to(device),
        inputs,
        labels,
        recipe,
        seed=mix_seed(seed, 0, 43),
        augment=augment,
        loss=loss,
        after_step=None if tick is None else partial(_tick, tick, seeds),
    )
    return Trained(network, trained)


def _tick(tick: Callable[[int], None], networks: int, step: int, losses: Tensor) -> None:
    tick(networks)


def judge_datasets(
    contestants: Mapping[str, DistilledDataset],
    networks: Mapping[str, Factory],
    test: tuple[Tensor, Tensor],
    config: JudgingConfig,
    *,
    seed: int = 0,
    augment: Augmentation | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train every network on every contestant, and test it.

    Args:
        contestants: by name; the first is the distilled one.
        networks: factories by name; the first is the one that ``accuracy`` is about.
        test: inputs and labels.
        config: the protocol.

    Returns:
        for each contestant a row: ``who``, ``accuracy`` and ``accuracy_std`` over seeds on the first network,
        ``accuracy on NAME`` for the others, ``samples``, ``bytes`` and ``lr``.
    """
    rows = []
    total = len(contestants) * len(networks) * config.judge_seeds * config.judge_steps
    done = 0
    with StageProgress("judging", total, enabled=progress) as bar:

        def tick(n: int) -> None:
            nonlocal done
            done += n
            if bar.due():
                bar.update(done)

        for who, dataset in contestants.items():
            row: dict[str, Any] = {"who": who}
            recipe = config.recipe(dataset.recipe)
            for number, (name, factory) in enumerate(networks.items()):
                trained = train_networks(
                    dataset,
                    factory,
                    recipe,
                    seeds=config.judge_seeds,
                    seed=mix_seed(seed, number),
                    augment=augment,
                    device=device,
                    tick=tick,
                )
                found = torch.tensor(trained.accuracies(*test))
                if number:
                    row[f"accuracy on {name}"] = float(found.mean())
                else:
                    row["accuracy"] = float(found.mean())
                    row["accuracy_std"] = float(found.std()) if len(found) > 1 else 0.0
            rows.append({**row, "samples": len(dataset), "bytes": dataset.nbytes, "lr": recipe.lr})
        bar.update(total)
    return rows


def everything(data: Data, most_bytes: int = MOST_BYTES) -> tuple[Tensor, Tensor]:
    """All inputs (N, ...) and labels (N,) of a data set, unaugmented, in memory.

    Raises:
        InputError: more than ``most_bytes`` of them, inputs of different sizes, or no labels.
    """
    inputs: list[Tensor] = []
    labels: list[Tensor] = []
    size = 0
    for batch in data.batches():
        if not isinstance(batch.inputs, Tensor) or batch.labels is None:
            raise InputError("dataset distillation needs inputs that are tensors of one size, with labels")
        inputs.append(batch.inputs)
        labels.append(batch.labels)
        size += batch.inputs.numel() * batch.inputs.element_size()
        if size > most_bytes:
            raise InputError(
                f"the data takes more than {most_bytes >> 30} GB in memory: distil a subset (train_size), or smaller images (image_size)"
            )
    if len({x.shape[1:] for x in inputs}) > 1:
        raise InputError("the images have different sizes: resize them to one (image_size)")
    return torch.cat(inputs), torch.cat(labels)
