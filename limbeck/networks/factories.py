"""Somebody else's networks, named ``package.module:factory``."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from functools import reduce
from typing import Any

from torch import nn

from limbeck.core.errors import InputError, nearest


def call_factory(name: str, *, in_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Import ``package.module:factory`` and call it.

    The factory (a class or function) is called with those of ``in_shape`` and ``num_classes`` that its signature
    names. One with ``**kwargs`` gets ``num_classes`` in any case, a word that torchvision and timm share, and
    ``in_shape`` only by name. The working directory is importable, as under ``python -m``.

    Args:
        name: dotted module path, a colon, dotted attribute path.
        in_shape: ``(C, H, W)`` of one input.
        num_classes: number of logits.

    Raises:
        InputError: the import, the look-up or the call fails, or the result is no ``nn.Module``.
    """
    factory = load_attribute(name)
    arguments = _accepted(factory, {"in_shape": in_shape, "num_classes": num_classes})
    try:
        network = factory(**arguments)
    except InputError:
        raise
    except Exception as error:
        given = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise InputError(f"the network factory '{name}' failed on ({given}): {_one_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise InputError(f"the network factory '{name}' returned {type(network).__name__}, not a torch.nn.Module")
    return network


def load_attribute(name: str) -> Callable[..., Any]:
    path, _, attribute = name.partition(":")
    if not path or not attribute:
        raise InputError(f"'{name}' names no network factory; write package.module:factory")
    here = os.getcwd()
    if "" not in sys.path and here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(path)
    except Exception as error:
        raise InputError(f"cannot import '{path}' for the network '{name}': {_one_line(error)}") from error
    try:
        factory = reduce(getattr, attribute.split("."), module)
    except AttributeError as error:
        near = nearest(attribute, [key for key in vars(module) if not key.startswith("_")])
        tail = f"; did you mean {' or '.join(near)}?" if near else ""
        raise InputError(f"the module '{path}' has no attribute '{attribute}'{tail}") from error
    if not callable(factory):
        raise InputError(f"'{name}' is a {type(factory).__name__}; a network factory must be callable")
    return factory


def _accepted(factory: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Those arguments that the factory's signature names, and ``num_classes`` where it takes any keyword."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:  # a builtin without a signature
        return {}
    keywords = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        keywords.add("num_classes")
    return {key: value for key, value in arguments.items() if key in keywords}


def _one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
