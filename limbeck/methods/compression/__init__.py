"""A network into fewer or coarser numbers.

Classes are importable from here by their names (``from limbeck.methods.compression import QuantizedDistillation``); the catalogue knows where
each of them lives, so that a new method needs no line in this file.
"""

from __future__ import annotations

from limbeck import catalogue

__getattr__ = catalogue.lazy_classes("compression")


def __dir__() -> list[str]:
    return sorted(name for card in catalogue.of_family("compression") for name in card.classes())
