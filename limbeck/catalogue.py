"""The cards of all methods, readable without importing torch.

A card is an entry of ``catalogue.toml``; ``card.load()`` imports the class behind it.
"""

from __future__ import annotations

import functools
import importlib
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from limbeck.core.errors import UnknownNameError

FAMILIES: Mapping[str, str] = {
    "models": "a model (or several) into a smaller one",
    "datasets": "a large data set into a handful of samples",
    "samplers": "a many-step generator into a few-step one",
    "fields": "a prior or a field into a field",
    "graphs": "a graph network into something faster",
    "search": "a search space into a student's shape",
    "compression": "a network into fewer or coarser numbers",
    "structures": "data into a structure: topology, order, features",
}


@dataclass(frozen=True)
class Card:
    """A method's entry in the catalogue."""

    name: str
    title: str
    family: str
    paper: str
    year: int
    summary: str
    needs: str
    gives: str
    claim: str
    implementation: str
    baseline: bool = False
    also: tuple[str, ...] = ()
    """Further public classes of the method, ``module:Class`` as ``implementation``: another form of it, say."""

    def load(self) -> type:
        """The class that implements the method."""
        return load_class(self.implementation)

    def classes(self) -> dict[str, str]:
        """Where each public class of the method lives, by its name; the one of a run by name comes first."""
        return {target.partition(":")[2]: target for target in (self.implementation, *self.also)}

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@functools.cache
def cards() -> dict[str, Card]:
    """All cards by name, in the file's order."""
    with open(Path(__file__).with_name("catalogue.toml"), "rb") as file:
        entries = tomllib.load(file)
    return {name: Card(name=name, **{**entry, "also": tuple(entry.get("also", ()))}) for name, entry in entries.items()}


def get(name: str) -> Card:
    """The card called ``name``; ``bd_kd`` and ``BD-KD`` mean ``bd-kd``.

    Raises:
        UnknownNameError: none such; the message proposes near ones.
    """
    key = name.lower().replace("_", "-")
    if key not in cards():
        raise UnknownNameError("method", name, cards(), hint="See: limbeck methods")
    return cards()[key]


def of_family(family: str) -> Iterator[Card]:
    """The cards of one family.

    Raises:
        UnknownNameError: no such family.
    """
    if family not in FAMILIES:
        raise UnknownNameError("family", family, FAMILIES, hint=f"Families: {', '.join(FAMILIES)}.")
    return (card for card in cards().values() if card.family == family)


def load_class(target: str) -> type:
    """The class behind ``module:Class``."""
    module, _, attribute = target.partition(":")
    found: type = getattr(importlib.import_module(module), attribute)
    return found


def lazy_classes(family: str) -> Callable[[str], Any]:
    """A module's ``__getattr__`` that imports the family's classes when they are asked for."""

    def find(attribute: str) -> Any:
        for card in of_family(family):
            if attribute in card.classes():
                return load_class(card.classes()[attribute])
        raise AttributeError(f"module 'limbeck.methods.{family}' has no attribute '{attribute}'")

    return find
