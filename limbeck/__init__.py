"""limbeck: distillation of every kind.

Five names make the public face; everything else is imported from where it lives::

    limbeck.fit(method, data, ...)   -> Run
    limbeck.load(path)               -> Artifact
    limbeck.catalogue                the cards of all methods
    limbeck.list_taps(model, sample) what can be tapped in a model

They load lazily, so that ``import limbeck`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "catalogue", "fit", "list_taps", "load"]

if TYPE_CHECKING:
    from limbeck import catalogue
    from limbeck.blocks.taps import list_taps
    from limbeck.core.artifacts import load
    from limbeck.fitting import fit

_HOME = {
    "fit": "limbeck.fitting",
    "load": "limbeck.core.artifacts",
    "list_taps": "limbeck.blocks.taps",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name == "catalogue":
        return importlib.import_module("limbeck.catalogue")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'limbeck' has no attribute '{name}'")
