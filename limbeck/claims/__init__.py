"""Claims: one experiment per method that tries to show the paper's effect against the paper's baseline."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

from limbeck import catalogue
from limbeck.core.errors import InputError

if TYPE_CHECKING:
    from limbeck.claims.base import Claim


def module_of(name: str) -> str:
    """The module that holds the claim of a method."""
    card = catalogue.get(name)
    return f"limbeck.claims.{card.family}.{card.name.replace('-', '_')}"


def claim_names() -> list[str]:
    """Methods that have a claim, in the catalogue's order."""
    return [n for n in catalogue.cards() if importlib.util.find_spec(module_of(n)) is not None]


def load_claim(name: str, data_root: str | None = None) -> Claim:
    """The claim of a method, on the data under ``data_root`` where it is there, else on bundled data.

    Raises:
        InputError: the method has no claim.
    """
    target = module_of(name)
    if importlib.util.find_spec(target) is None:
        raise InputError(f"'{name}' has no claim to verify; methods with claims: {', '.join(claim_names())}")
    claim: Claim = importlib.import_module(target).claim(data_root)
    return claim
