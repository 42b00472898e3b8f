"""Distillation of samplers: a generator of many steps into one of few.

Classes are importable from here by their names (``from limbeck.methods.samplers import InstaFlow``); the catalogue knows where
each of them lives, so that a new method needs no line in this file.
"""

from __future__ import annotations

from limbeck import catalogue

__getattr__ = catalogue.lazy_classes("samplers")


def __dir__() -> list[str]:
    return sorted(name for card in catalogue.of_family("samplers") for name in card.classes())
