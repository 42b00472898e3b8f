"""Model distillation: a model (or several) into a smaller one.

Classes are importable from here by their names (``from limbeck.methods.models import KD``); the catalogue knows where each
of them lives, so that a new method needs no line in this file.
"""

from __future__ import annotations

from limbeck import catalogue

__getattr__ = catalogue.lazy_classes("models")


def __dir__() -> list[str]:
    return sorted(name for card in catalogue.of_family("models") for name in card.classes())
