"""New random weights for a network that exists already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from limbeck.core.errors import InputError

REMEDY = "give a function that builds the network instead of the network"


def redraw(module: nn.Module, remedy: str = REMEDY) -> None:
    """Draw all weights of a module anew, in place, from torch's random state.

    Every part is asked to do it itself (``reset_parameters``, which also resets running statistics), children before their
    parents, so that a parent's own scheme wins. Parts whose parameters are all frozen keep them.

    Args:
        module: changed in place.
        remedy: what a user can do instead, for the error message.

    Raises:
        InputError: see :func:`check_redrawable`.
    """
    check_redrawable(module, remedy)
    module.apply(_redraw_part)


def check_redrawable(module: nn.Module, remedy: str = REMEDY) -> None:
    """That every trainable parameter belongs to a part that knows how to draw it, or to a child of one.

    Raises:
        InputError: one does not; the message names it.
    """
    able = {name for name, part in module.named_modules() if _reset_of(part) is not None}
    for name, parameter in module.named_parameters():
        owners = name.split(".")[:-1]
        above = (".".join(owners[:depth]) for depth in range(len(owners) + 1))
        if parameter.requires_grad and not any(a in able for a in above):
            raise InputError(
                f"the parameter '{name}' of {type(module).__name__} cannot be drawn anew, since no module that holds it has "
                f"reset_parameters(): {remedy}"
            )


def _redraw_part(part: nn.Module) -> None:
    reset = _reset_of(part)
    own = list(part.parameters(recurse=False))
    if reset is not None and (not own or any(p.requires_grad for p in own)):
        reset()


def _reset_of(part: nn.Module) -> Callable[[], Any] | None:
    for name in ("reset_parameters", "_reset_parameters"):  # attention and transformers of torch have the second
        found = getattr(part, name, None)
        if callable(found):
            reset: Callable[[], Any] = found
            return reset
    return None
