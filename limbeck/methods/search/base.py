"""The contract of the ``search`` family: a search space and a budget in, a student's shape (and the student) out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import nn

from limbeck.blocks.search_spaces import Budget, Code, SearchSpace
from limbeck.core.errors import UnknownNameError
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


COSTS: Mapping[str, Callable[[nn.Module, Any], float]] = {
    "parameters": lambda network, _: float(count_parameters(network)),
    "flops": lambda network, sample: float(count_flops(network, sample)),
}
"""What a bound may be on without a function of one's own: cost of a network and a batch of inputs."""


def costs_of(network: nn.Module, inputs: Any, names: Iterable[str] = tuple(COSTS)) -> dict[str, float]:
    """``parameters``, and ``flops`` for one sample, of a network.

    Args:
        network: any module.
        inputs: the shape of one input (without the batch), or a batch of inputs.
        names: which costs; counting FLOPs takes a forward pass.

    Raises:
        UnknownNameError: a cost that is not counted here.
    """
    shape = isinstance(inputs, tuple | list) and all(isinstance(n, int) for n in inputs)
    sample = torch.zeros(1, *inputs) if shape else inputs
    costs = {}
    for name in names:
        if name not in COSTS:
            raise UnknownNameError("cost", name, COSTS, hint="Give a Budget with a function that knows it.")
        costs[name] = COSTS[name](network, sample)
    return costs


def budget_for(
    space: SearchSpace,
    inputs: Any,
    most: Budget | Mapping[str, float] | None,
    cost: Callable[[Code], Mapping[str, float]] | None = None,
) -> Budget:
    """A budget over members of a space. The costs that are bounded are counted on the network itself unless ``cost`` knows them.

    Args:
        space: what is searched.
        inputs: see :func:`costs_of`.
        most: bounds by name; None: no bounds. A budget is given back as it is.
        cost: code -> costs.
    """
    if isinstance(most, Budget):
        return most
    bounds = dict(most or {})
    return Budget(cost or (lambda code: costs_of(space.build(code), inputs, tuple(bounds))), bounds)
