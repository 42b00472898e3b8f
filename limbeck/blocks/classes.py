"""How many classes a classifier has, where nobody says so."""

from __future__ import annotations

from torch import nn

from limbeck.core.errors import InputError


def class_count(model: nn.Module, purpose: str) -> int:
    """The number of classes from what the model's library says (``num_classes``, ``config.num_labels``), or its last linear layer.

    Args:
        model: a classifier.
        purpose: who must know it, for the error message, such as "the controller".

    Raises:
        InputError: the model does not show it.
    """
    for said in (getattr(model, "num_classes", None), getattr(getattr(model, "config", None), "num_labels", None)):
        if isinstance(said, int) and said > 0:
            return said
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise InputError(
            f"{purpose} must know the number of classes, and the student does not show it: give num_classes=…"
        )
    return linear[-1].out_features
