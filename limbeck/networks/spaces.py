"""Search spaces of networks that are built by name, so that any member can be kept and read again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from limbeck.blocks.search_spaces import SearchSpace
from limbeck.core.errors import InputError, UnknownNameError
from limbeck.networks.cells import EDGES, OPERATIONS
from limbeck.networks.factories import load_attribute
from limbeck.networks.registry import build

DEPTHS = (1, 3, 5, 7)


@dataclass(frozen=True)
class NamedSpace:
    """A space, and the name of a network that is at least as large as all of its members and has their last width.

    Attributes:
        space: what is searched.
        teacher: a network's name, a teacher where nobody gives one; None where it is not known.
    """

    space: SearchSpace
    teacher: str | None = None


def depth_space(
    in_shape: tuple[int, ...],
    num_classes: int,
    *,
    width: int = 16,
    depths: tuple[int, ...] = DEPTHS,
    stages: int = 3,
) -> NamedSpace:
    """Residual networks with a choice of depth for every stage; with the defaults the 64 networks of S0, and ResNet-56 (9-9-9).

    Args:
        in_shape: ``(C, H, W)`` of one input.
        num_classes: number of logits.
        width: channels of the first stage.
        depths: blocks that a stage may have.
        stages: how many.
    """

    def make(**blocks: int) -> nn.Module:
        name = f"stageresnet-{'-'.join(map(str, blocks.values()))}-w{width}"
        return build(name, in_shape=in_shape, num_classes=num_classes)

    choices = {f"stage{number + 1}": depths for number in range(stages)}
    deepest = "-".join([str(max(depths) + 2)] * stages)
    return NamedSpace(SearchSpace("depths", choices, make), f"stageresnet-{deepest}-w{width}")


def cell_space(
    in_shape: tuple[int, ...], num_classes: int, *, width: int = 16, cells: int = 1, stages: int = 3
) -> NamedSpace:
    """The 15,625 cells of NAS-Bench-201, and the one with 3x3 convolutions throughout, with as many cells again in each stage.

    Args:
        in_shape: ``(C, H, W)`` of one input.
        num_classes: number of logits.
        width: channels of the first stage (16 in the benchmark).
        cells: in each stage (5 in the benchmark).
        stages: how many (3 in the benchmark).
    """

    def make(**operations: str) -> nn.Module:
        digits = "".join(str(OPERATIONS.index(name) + 1) for name in operations.values())
        name = f"cell-{digits}-w{width}-n{cells}-s{stages}"
        return build(name, in_shape=in_shape, num_classes=num_classes)

    choices = {f"edge{start}{end}": OPERATIONS for start, end in EDGES}
    return NamedSpace(SearchSpace("cells", choices, make), f"cell-{'4' * len(EDGES)}-w{width}-n{2 * cells}-s{stages}")


def network_space(names: Sequence[str], in_shape: tuple[int, ...], num_classes: int) -> NamedSpace:
    """A choice between networks by name.

    Raises:
        UnknownNameError: one of them does not exist.
    """
    for name in names:
        build(name, in_shape=in_shape, num_classes=num_classes)

    def make(network: str) -> nn.Module:
        return build(network, in_shape=in_shape, num_classes=num_classes)

    return NamedSpace(SearchSpace("networks", {"network": tuple(dict.fromkeys(names))}, make))


SPACES: dict[str, Callable[..., NamedSpace]] = {"depths": depth_space, "cells": cell_space}


def named_space(name: str, in_shape: tuple[int, ...], num_classes: int, **sizes: Any) -> NamedSpace:
    """A space by name; several networks' names with commas between them; or ``package.module:factory``, which is called with ``in_shape`` and
    ``num_classes`` and gives a :class:`~limbeck.blocks.search_spaces.SearchSpace` (or a :class:`NamedSpace`).

    Raises:
        UnknownNameError: no such space.
        InputError: the factory cannot be imported or gives something else.
    """
    if "," in name:
        return network_space([n.strip() for n in name.split(",") if n.strip()], in_shape, num_classes)
    if ":" in name:
        found = load_attribute(name)(in_shape=in_shape, num_classes=num_classes)
        found = NamedSpace(found) if isinstance(found, SearchSpace) else found
        if not isinstance(found, NamedSpace):
            raise InputError(f"'{name}' gave a {type(found).__name__}, not a SearchSpace")
        return found
    if name not in SPACES:
        raise UnknownNameError(
            "search space",
            name,
            SPACES,
            hint=f"Known: {', '.join(SPACES)}; also networks' names with commas between them, or package.module:factory.",
        )
    return SPACES[name](in_shape, num_classes, **sizes)
