"""Distillation into fields: a field into one of another architecture, a 2-D prior or photographs into a scene.

Classes are importable from here by their names (``from limbeck.methods.fields import PVD``); the catalogue knows where
each of them lives, so that a new method needs no line in this file.
"""

from __future__ import annotations

from limbeck import catalogue

__getattr__ = catalogue.lazy_classes("fields")


def __dir__() -> list[str]:
    return sorted(name for card in catalogue.of_family("fields") for name in card.classes())
