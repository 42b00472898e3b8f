"""Choosing the shape of a student: search without training, and networks that hold many students.

Classes are importable from here by their names (``from limbeck.methods.search import DisWOT``); the catalogue knows where
each of them lives, so that a new method needs no line in this file.
"""

from __future__ import annotations

from limbeck import catalogue

__getattr__ = catalogue.lazy_classes("search")


def __dir__() -> list[str]:
    return sorted(name for card in catalogue.of_family("search") for name in card.classes())
