"""Checks of sizes that all small transformers share."""

from __future__ import annotations

from limbeck.core.errors import InputError


def window(in_shape: tuple[int, ...], what: str) -> int:
    """The tokens of inputs of shape ``(tokens,)``.

    Args:
        in_shape: of one input.
        what: the kind of network, for the message.

    Raises:
        InputError: inputs of another kind.
    """
    if len(in_shape) != 1:
        raise InputError(f"{what} takes inputs of shape (tokens,), not {in_shape}: choose a network for such inputs")
    return in_shape[0]


def divided(width: int, heads: int, what: str) -> int:
    """The width, which the heads divide.

    Raises:
        InputError: they do not.
    """
    if width % heads:
        raise InputError(f"{heads} attention heads do not divide the width {width} of {what}")
    return width
