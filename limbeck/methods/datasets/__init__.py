"""Dataset distillation: a large data set into a handful of samples.

Classes are importable from here by their names (``from limbeck.methods.datasets import DataDAM``); the catalogue knows where
each of them lives, so that a new method needs no line in this file.
"""

from __future__ import annotations

from limbeck import catalogue

__getattr__ = catalogue.lazy_classes("datasets")


def __dir__() -> list[str]:
    return sorted(name for card in catalogue.of_family("datasets") for name in card.classes())
