"""The contract of the ``search`` family: a search space and a budget in, a student's shape (and the student) out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import nn

from limbeck.blocks.search_spaces import Budget, Code, SearchSpace
from limbeck.core.method import Method
from limbeck.core.optim import TrainingConfig
from limbeck.metrics.cost import count_flops, count_parameters
from limbeck.tasks.base import TaskConfig


class SearchMethod(Method):
    """Base of the methods that choose a student's shape.

    A method says what is searched (:class:`~limbeck.blocks.search_spaces.SearchSpace`), within which budget, and how members are judged. What comes out is
    one network or several, beside the record of the search.
    """

    family = "search"

    class Config(TrainingConfig):
        """How the networks that are trained are trained."""

        views: int | None = Field(
            None, ge=1, description="number of different augmented views of each sample; none: a new one every epoch"
        )
        evaluations: int = Field(8, ge=0, description="how often to evaluate on validation data while training")

    class Setup(TaskConfig):
        """What a run by name builds: task, space and budget."""

        max_parameters: float | None = Field(None, gt=0, description="parameters that a student may have; none: any")
        max_flops: float | None = Field(None, gt=0, description="FLOPs per sample that a student may take; none: any")

    @staticmethod
    def bounds(setup: Any) -> dict[str, float]:
        """The bounds of a setup by the names of their costs."""
        asked = {"parameters": setup.max_parameters, "flops": setup.max_flops}
        return {name: float(bound) for name, bound in asked.items() if bound is not None}


def costs_of(network: nn.Module, in_shape: tuple[int, ...]) -> dict[str, float]:
    """``parameters``, and ``flops`` for one sample, of a network for inputs of that shape (without the batch)."""
    sample = torch.zeros(1, *in_shape)
    return {"parameters": float(count_parameters(network)), "flops": float(count_flops(network, sample))}


def budget_for(
    space: SearchSpace,
    in_shape: tuple[int, ...],
    most: Mapping[str, float],
    cost: Callable[[Code], Mapping[str, float]] | None = None,
) -> Budget:
    """A budget over members of a space, whose costs are counted on the network itself unless ``cost`` knows them."""
    return Budget(cost or (lambda code: costs_of(space.build(code), in_shape)), dict(most))
