"""How distilled graphs are judged: fresh graph networks are trained on them from scratch and tested on ordinary graphs.

Every contestant gets the same networks with the same initial weights and the same number of Adam updates, with a learning rate
that falls on a cosine (our decision). The last weights are tested.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import call_model, logits_of
from limbeck.core.data import Stream, mix_seed
from limbeck.core.distilled_graphs import DistilledGraphs
from limbeck.core.graphs import GraphData
from limbeck.core.progress import StageProgress
from limbeck.core.seeding import preserved_random_state, seed_everything
from limbeck.networks.fresh import Factory
from limbeck.tasks.judging_datasets import JudgingConfig


def train_on_graphs(
    network: nn.Module,
    dataset: DistilledGraphs,
    *,
    steps: int,
    batch_size: int = 128,
    lr: float = 0.01,
    weight_decay: float = 0.0,
    seed: int = 0,
    after_step: Callable[[], None] | None = None,
) -> nn.Module:
    """Train a graph classifier in place, and leave it in evaluation mode.

    Where the data set says how items are drawn, ``batch_size`` of them are drawn with replacement in every step; an item goes through
    the network once, and its loss counts as often as it was drawn. Else all items are gone through, shuffled.

    Args:
        network: from :class:`limbeck.core.graphs.GraphBatch` to logits.
        dataset: what to train on.
        steps: updates.
        batch_size: items per update.
        lr: of Adam, at the start.
        weight_decay: added to the gradient.
        seed: of the draws.
        after_step: called after each update.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    device = next(network.parameters()).device
    chances = dataset.probabilities()
    stream = Stream(dataset.graphs, batch_size, seed=mix_seed(seed, 5))
    generator = torch.Generator().manual_seed(mix_seed(seed, 6))
    network.train()
    for step in range(steps):
        weights: Tensor | None = None
        if chances is None:
            batch = stream.batch(step)
        else:
            drawn = torch.bincount(torch.multinomial(chances, batch_size, replacement=True, generator=generator))
            ids = drawn.nonzero().flatten()
            batch = dataset.graphs.fetch(ids, None)
            weights = (drawn[ids].float() / batch_size).to(device)
        batch = batch.to(device)
        assert batch.labels is not None
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        each = F.cross_entropy(logits_of(call_model(network, batch.inputs)), batch.labels, reduction="none")
        loss = each.mean() if weights is None else (weights * each).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if after_step is not None:
            after_step()
    return network.eval()


@torch.no_grad()
def graph_logits(network: nn.Module, data: GraphData, batch_size: int = 512) -> Tensor:
    """(G, C) logits of a network on all graphs, on the CPU."""
    device = next(network.parameters()).device
    said = [logits_of(call_model(network, b.to(device).inputs)).cpu() for b in data.batches(batch_size)]
    return torch.cat(said)


def graph_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """``accuracy``, and ``auroc``: the area under the ROC curve, with more than two classes the mean of each against the rest.

    A class that the labels do not show, or that is all they show, has no curve; without any curve ``auroc`` is missing.
    """
    from sklearn.metrics import roc_auc_score

    found = {"accuracy": float((logits.argmax(1) == labels).double().mean())}
    scores = torch.softmax(logits.double(), 1).numpy()
    truth = labels.numpy()
    columns = [1] if logits.shape[1] == 2 else range(logits.shape[1])
    areas = [roc_auc_score(truth == c, scores[:, c]) for c in columns if 0 < (truth == c).sum() < len(truth)]
    if areas:
        found["auroc"] = float(np.mean(areas))
    return found


def judge_graphs(
    contestants: Mapping[str, DistilledGraphs],
    networks: Mapping[str, Factory],
    test: GraphData,
    config: JudgingConfig,
    *,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train every network on every contestant, and test it.

    Args:
        contestants: by name; the first is the distilled one.
        networks: factories by name; the first is the one that ``accuracy`` and ``auroc`` are about.
        test: ordinary graphs.
        config: the protocol.
        seed: of initial weights and draws.
        progress: show progress.

    Returns:
        for each contestant a row: ``who``, ``accuracy`` and ``accuracy_std`` over seeds and ``auroc`` on the first network,
        ``accuracy on NAME`` and ``auroc on NAME`` for the others, ``samples`` and ``bytes``.
    """
    rows = []
    total = len(contestants) * len(networks) * config.judge_seeds * config.judge_steps
    done = 0
    with StageProgress("judging", total, enabled=progress) as bar:

        def tick() -> None:
            nonlocal done
            done += 1
            if bar.due():
                bar.update(done)

        for who, dataset in contestants.items():
            row: dict[str, Any] = {"who": who}
            for number, (name, factory) in enumerate(networks.items()):
                found = [
                    train_and_test(dataset, factory, test, config, seed=mix_seed(seed, number, s), after_step=tick)
                    for s in range(config.judge_seeds)
                ]
                for measure in found[0]:
                    values = torch.tensor([f[measure] for f in found])
                    row[f"{measure} on {name}" if number else measure] = float(values.mean())
                    if measure == "accuracy" and not number:
                        row["accuracy_std"] = float(values.std()) if len(values) > 1 else 0.0
            rows.append({**row, "samples": len(dataset), "bytes": dataset.nbytes})
        bar.update(total)
    return rows


def train_and_test(
    dataset: DistilledGraphs,
    factory: Factory,
    test: GraphData,
    config: JudgingConfig,
    *,
    seed: int,
    after_step: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Measures (:func:`graph_metrics`) on ordinary graphs of a network that was trained on a data set from scratch."""
    with preserved_random_state():
        seed_everything(mix_seed(seed, 41))
        network = factory()
        train_on_graphs(
            network,
            dataset,
            steps=config.judge_steps,
            batch_size=config.judge_batch_size,
            lr=float(dataset.recipe.get("lr", config.judge_lr)),
            seed=seed,
            after_step=after_step,
        )
    return graph_metrics(graph_logits(network, test), test.labels_tensor())
