"""Where a classifier ends: its last linear layer, and the last map before positions are pooled."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from limbeck.blocks.taps import unwrap
from limbeck.core.batch import call_model, logits_of
from limbeck.core.errors import InputError, UnknownNameError

_POOLS = (
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.Flatten,
    nn.Dropout,
    nn.Dropout2d,
)


@dataclass(frozen=True)
class HeadPaths:
    """Layers by module path; None: found by :func:`answer`.

    Attributes:
        features: the layer whose output counts as the last map.
        classifier: the linear layer that gives the logits.
    """

    features: str | None = None
    classifier: str | None = None


FOUND = HeadPaths()
"""Both layers are found."""


@dataclass(frozen=True)
class Answer:
    """What one forward pass gave.

    Attributes:
        logits: (B, N).
        features: (B, C, H, W), (B, T, C) or (B, C), the last map before pooling.
        classifier: the last linear layer.
    """

    logits: Tensor
    features: Tensor
    classifier: nn.Linear


def answer(network: nn.Module, inputs: Any, paths: HeadPaths = FOUND) -> Answer:
    """Run a classifier in its present mode, and pick its last map and last linear layer out of what its modules gave.

    The classifier is the last linear layer that ran and whose output is as wide as the logits. The map is the last output before that of
    three axes or more with more than one position (so no pooled map); failing that, the last with three axes or more; failing that, what
    the classifier takes. Pooling, flattening and dropout count as what comes after the map.

    Args:
        network: any classifier.
        inputs: a tensor, a tuple or a mapping, as :func:`~limbeck.core.batch.call_model` takes them.
        paths: where these layers are, if they are known.

    Raises:
        UnknownNameError: no layer of the given path.
        InputError: no linear layer gives the logits; a layer with a given path did not run or gives no tensor.
    """
    root = unwrap(network)
    names = {module: path for path, module in root.named_modules()}
    for path in (paths.features, paths.classifier):
        if path is not None and path not in names.values():
            raise UnknownNameError("layer", path, names.values())
    ran: list[tuple[nn.Module, Any, Tensor]] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            ran.append((module, args, output))

    with ExitStack() as stack:
        for module in names:
            if module is not root:
                stack.callback(module.register_forward_hook(note).remove)
        logits = logits_of(call_model(network, inputs))
    last = _last_linear(network, ran, names, logits, paths.classifier)
    classifier, args, _ = ran[last]
    assert isinstance(classifier, nn.Linear)
    features = _last_map(ran[:last], names, paths.features)
    return Answer(logits, args[0] if features is None else features, classifier)


def _last_linear(
    network: nn.Module, ran: list[Any], names: dict[nn.Module, str], logits: Tensor, path: str | None
) -> int:
    found = [
        number
        for number, (module, _, output) in enumerate(ran)
        if isinstance(module, nn.Linear)
        and (output.shape[-1] == logits.shape[-1] if path is None else names[module] == path)
    ]
    if not found:
        what = "has no linear layer that gives its logits" if path is None else f"did not call a linear layer '{path}'"
        raise InputError(f"{type(network).__name__} {what}: the score of semantics needs one")
    return found[-1]


def _last_map(ran: list[Any], names: dict[nn.Module, str], path: str | None) -> Tensor | None:
    if path is not None:
        named: list[Tensor] = [output for module, _, output in ran if names[module] == path]
        if not named:
            raise InputError(f"the layer '{path}' gave no tensor before the classifier ran: name another one")
        return named[-1]
    maps: list[Tensor] = [output for module, _, output in ran if output.ndim > 2 and not isinstance(module, _POOLS)]
    wide = [m for m in maps if (m[0, 0].numel() if m.ndim > 3 else m.shape[1]) > 1]
    return next(reversed(wide or maps), None)
