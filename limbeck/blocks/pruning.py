"""Unstructured pruning by magnitude: masks over weights, held while training goes on, and lottery tickets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from limbeck.core.errors import InputError


@dataclass(frozen=True)
class Masks:
    """Which weights of a model are kept.

    Attributes:
        kept: by parameter name a bool tensor of its shape, True where the weight is kept.
    """

    kept: Mapping[str, Tensor]

    @classmethod
    def full(cls, model: nn.Module, names: Sequence[str] | None = None) -> Self:
        """Masks that keep everything.

        Args:
            names: parameters that may be pruned; None: all trainable ones with two axes or more (the weights of linear and
                convolutional layers, and embeddings; no biases, no normalisation).

        Raises:
            InputError: no such parameter, or none at all.
        """
        known = dict(model.named_parameters())
        chosen = [n for n, p in known.items() if p.requires_grad and p.ndim >= 2] if names is None else list(names)
        for name in chosen:
            if name not in known:
                raise InputError(
                    f"there is no parameter '{name}' to prune; the model has {', '.join(list(known)[:5])}, …"
                )
        if not chosen:
            raise InputError("the model has no weights to prune (trainable parameters with two axes or more)")
        return cls({name: torch.ones_like(known[name], dtype=torch.bool) for name in chosen})

    @property
    def size(self) -> int:
        """Number of weights under the masks."""
        return sum(m.numel() for m in self.kept.values())

    @property
    def remaining(self) -> int:
        """Number of weights that are kept."""
        return sum(int(m.sum()) for m in self.kept.values())

    @property
    def sparsity(self) -> float:
        """Share of the weights that is pruned, in [0, 1]."""
        return 1 - self.remaining / self.size

    @torch.no_grad()
    def shrunk(self, model: nn.Module, fraction: float) -> Masks:
        """Masks without the smallest ``fraction`` of the weights that are still kept, over all layers together.

        Exactly ``round(fraction * remaining)`` weights go, those of smallest absolute value; between equal ones, the earlier.

        Args:
            model: whose weights are compared, usually after training.
            fraction: in [0, 1).

        Raises:
            InputError: ``fraction`` out of range, or a model that lacks a masked parameter.
        """
        if not 0 <= fraction < 1:
            raise InputError(f"the fraction of weights to prune must be in [0, 1) (got {fraction})")
        weights = self._weights(model)
        sizes = torch.cat([w.abs().flatten().double() for w in weights.values()])
        kept = torch.cat([self.kept[name].to(w.device).flatten() for name, w in weights.items()])
        gone = round(fraction * int(kept.sum()))
        ranked = torch.where(kept, sizes, torch.inf).argsort(stable=True)
        kept = kept.clone()
        kept[ranked[:gone]] = False
        parts = kept.split([w.numel() for w in weights.values()])
        return Masks({name: part.view_as(w) for (name, w), part in zip(weights.items(), parts, strict=True)})

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> nn.Module:
        """Set the pruned weights to 0, in place. As a stage's ``after_step`` it holds them there.

        Raises:
            InputError: the model lacks a masked parameter, or its shape differs.
        """
        for name, weight in self._weights(model).items():
            weight.mul_(self.kept[name].to(weight.device))
        return model

    def hold(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Keep the pruned weights at 0: set them now, and again after every step of the optimiser, whatever its momentum does.

        Returns:
            a handle whose ``remove()`` ends it.
        """
        self.apply_(model)

        def after(*_: Any) -> None:
            self.apply_(model)

        return optimizer.register_step_post_hook(after)

    def _weights(self, model: nn.Module) -> dict[str, Tensor]:
        known = dict(model.named_parameters())
        for name, mask in self.kept.items():
            if name not in known or known[name].shape != mask.shape:
                raise InputError(f"the masks do not fit the model: '{name}' of shape {tuple(mask.shape)} is not in it")
        return {name: known[name] for name in self.kept}


@dataclass(frozen=True)
class Ticket:
    """One round of iterative pruning.

    Attributes:
        round: 0 is the dense network.
        masks: that this round was trained with.
        score: what ``evaluate`` gave after training, or None.
    """

    round: int
    masks: Masks
    score: Any = None

    @property
    def sparsity(self) -> float:
        return self.masks.sparsity


def lottery_tickets(
    model: nn.Module,
    train: Callable[[nn.Module, Masks], object],
    *,
    rounds: int,
    fraction: float = 0.2,
    rewind: Mapping[str, Tensor] | None = None,
    evaluate: Callable[[nn.Module], Any] | None = None,
    names: Sequence[str] | None = None,
) -> Iterator[Ticket]:
    """Iterative magnitude pruning with rewinding: train, prune the smallest weights, put the rest back, again.

    Round r trains a network of which ``1 - (1 - fraction)^r`` is pruned, from the same weights as round 0. To rewind to a later
    point than the start, train that far first, or give its state.

    Args:
        model: at the weights to start from; it is trained in place, and holds the round's trained weights when a ticket is given out.
        train: trains the model in place while holding the masks (:meth:`Masks.hold`, or :meth:`Masks.apply_` after every step).
        rounds: how many prunings; gives ``rounds + 1`` tickets.
        fraction: of the remaining weights, pruned per round, in (0, 1).
        rewind: a state dict to go back to; the model's present state if None.
        evaluate: scores the trained model.
        names: parameters that may be pruned, see :meth:`Masks.full`.

    Source: "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks" (2019); rewinding: "Linear Mode Connectivity
    and the Lottery Ticket Hypothesis" (2020).

    Raises:
        InputError: ``rounds`` negative, ``fraction`` out of range, or training that left pruned weights other than 0.
    """
    if rounds < 0:
        raise InputError(f"rounds of pruning must be at least 0 (got {rounds})")
    if not 0 < fraction < 1:
        raise InputError(f"the fraction of weights to prune must be in (0, 1) (got {fraction})")
    start = {
        name: tensor.detach().clone() for name, tensor in (model.state_dict() if rewind is None else rewind).items()
    }
    masks = Masks.full(model, names)
    for number in range(rounds + 1):
        model.load_state_dict(start)
        masks.apply_(model)
        train(model, masks)
        weights = dict(model.named_parameters())
        if any(bool((weights[name][~mask.to(weights[name].device)] != 0).any()) for name, mask in masks.kept.items()):
            raise InputError(
                "training moved pruned weights away from 0: hold the masks with masks.hold(model, optimizer)"
            )
        yield Ticket(number, masks, None if evaluate is None else evaluate(model))
        masks = masks.shrunk(model, fraction)
