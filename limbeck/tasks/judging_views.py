"""Judging small data sets whose labels belong to views: fresh networks are trained on views, and tested on real data.

This is the protocol of methods that relabel every augmented view with a teacher. It is kept apart from the one with a fixed
label for each image (:mod:`limbeck.tasks.judging_datasets`): the teacher puts knowledge of its own into the labels, which also
helps random images, so a row of those belongs beside every other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from limbeck.blocks.ensembles import Loss
from limbeck.blocks.flat import draw_flat
from limbeck.blocks.view_labelers import Labeler
from limbeck.blocks.view_training import ViewRecipe, train_on_views
from limbeck.core.data import mix_seed
from limbeck.core.progress import StageProgress
from limbeck.core.seeding import preserved_random_state, seed_everything
from limbeck.networks.fresh import Factory
from limbeck.tasks.judging_datasets import Trained


def train_networks_on_views(
    labeler: Labeler,
    factory: Factory,
    recipe: ViewRecipe,
    *,
    seeds: int,
    seed: int = 0,
    loss: Loss | None = None,
    device: torch.device | str = "cpu",
    tick: Callable[[int], None] | None = None,
) -> Trained:
    """Train fresh networks on views.

    Args:
        labeler: gives views and labels, on ``device``.
        factory: builds a network with new weights.
        recipe: the training.
        seeds: number of networks; they are trained together and see the same views in different orders.
        seed: of their initial weights and orders.
        loss: see :func:`~limbeck.blocks.view_training.train_on_views`.
        device: where to train.
        tick: called with the number of updates since the last call.
    """
    with preserved_random_state():
        seed_everything(mix_seed(seed, 41))
        network, theta = draw_flat(factory, seeds)
    network.skeleton.to(device)

    def after(step: int, losses: Tensor) -> None:
        if tick is not None:
            tick(seeds)

    theta = train_on_views(
        network, theta.to(device), labeler, recipe, seed=mix_seed(seed, 43), loss=loss, after_step=after
    )
    return Trained(network, theta)


def judge_on_views(
    contestants: Mapping[str, tuple[Labeler, int]],
    networks: Mapping[str, Factory],
    test: tuple[Tensor, Tensor],
    recipe: ViewRecipe,
    *,
    seeds: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train every network on every contestant's views, and test it.

    Args:
        contestants: by name, a labeler and the bytes that images and labels (or the labelling teacher) take together.
        networks: factories by name; the first is the one that ``accuracy`` is about.
        test: inputs and labels.
        recipe: the same training for all.

    Returns:
        rows as of :func:`limbeck.tasks.judging_datasets.judge_datasets`.
    """
    total = sum(recipe.steps(len(labeler.images)) for labeler, _ in contestants.values()) * len(networks) * seeds
    rows = []
    done = 0
    with StageProgress("judging on views", total, enabled=progress) as bar:

        def tick(n: int) -> None:
            nonlocal done
            done += n
            if bar.due():
                bar.update(done)

        for who, (labeler, nbytes) in contestants.items():
            row: dict[str, Any] = {"who": who}
            for number, (name, factory) in enumerate(networks.items()):
                trained = train_networks_on_views(
                    labeler, factory, recipe, seeds=seeds, seed=mix_seed(seed, number), device=device, tick=tick
                )
                found = torch.tensor(trained.accuracies(*test))
                if number:
                    row[f"accuracy on {name}"] = float(found.mean())
                else:
                    row["accuracy"] = float(found.mean())
                    row["accuracy_std"] = float(found.std()) if len(found) > 1 else 0.0
            rows.append({**row, "samples": len(labeler.images), "bytes": nbytes, "lr": recipe.lr})
        bar.update(total)
    return rows
