"""Graph networks into something faster, and what their links and neighbourhoods say.

Classes are importable from here by their names (``from limbeck.methods.graphs import LightHGNN``); the catalogue knows where
each of them lives, so that a new method needs no line in this file.
"""

from __future__ import annotations

from limbeck import catalogue

__getattr__ = catalogue.lazy_classes("graphs")


def __dir__() -> list[str]:
    return sorted(name for card in catalogue.of_family("graphs") for name in card.classes())
