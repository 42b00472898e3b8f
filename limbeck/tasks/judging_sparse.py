"""What a sparse network is shown beside its dense teacher: zeros by layer, losses over sparsity, a text, speed of sparse execution."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.blocks.one_shot_pruning import Pattern, as_matrix, from_matrix, magnitude
from limbeck.core.data import Data
from limbeck.metrics.cost import measure_latency
from limbeck.report.sparsity_plots import layer_bars_png, sparsity_curves_png, texts_png
from limbeck.tasks.judging import judge_classifiers
from limbeck.tasks.judging_language import continued, judge_language_models, token_measures

SHARES = (0.0, 0.25, 0.5, 0.65, 0.75, 0.8, 0.85, 0.9, 0.95)
PROMPT, WRITTEN = 48, 240


def layer_picture(shares: Mapping[str, float]) -> dict[str, str]:
    """Zeros by layer."""
    names = {name.removesuffix(".weight"): share for name, share in shares.items()}
    caption = f"Share of zeros in each of the {len(names)} pruned layers; all others are dense."
    return {"title": "Sparsity by layer", "caption": caption, "png": layer_bars_png(names)}


@torch.no_grad()
def one_shot_curve(
    dense: nn.Module, layers: Sequence[str], loss: Callable[[nn.Module], float], shares: Sequence[float] = SHARES
) -> list[tuple[float, float]]:
    """(sparsity, loss) of a dense network whose layers are pruned by magnitude and not trained again; the network is left alone."""
    points = []
    made = copy.deepcopy(dense)
    for share in sorted(shares):  # each from the one before: by magnitude that is the same
        for name in layers:
            layer: Any = made.get_submodule(name)
            matrix = as_matrix(layer)
            layer.weight.copy_(from_matrix(layer, matrix * magnitude(matrix, Pattern(share))))
        points.append((share, loss(made)))
    return points


def loss_picture(
    one_shot: Sequence[tuple[float, float]], student: tuple[float, float], history: Tensor, label: str
) -> dict[str, str]:
    """The loss over sparsity.

    Args:
        one_shot: of the dense network pruned by magnitude. student: what came out, (sparsity, loss).
        history: (cycles, 3) sparsity, loss on validation data when pruned, and when trained again; negative where unknown.
        label: of the loss.
    """
    curves: dict[str, Sequence[tuple[float, float]]] = {"pruned by magnitude, not trained again": one_shot}
    known = history[history[:, 0] >= 0]
    if len(known) > 1:
        curves["validation, when pruned"] = [(float(s), float(v)) for s, v, _ in known]
        curves["validation, trained again"] = [(float(s), float(v)) for s, _, v in known]
    png = sparsity_curves_png(curves, label, {"the student": student})
    caption = "On test data, unless it says otherwise. The leftmost point is the dense network."
    return {"title": "Loss over sparsity", "caption": caption, "png": png}


def text_picture(models: Mapping[str, nn.Module], test: Data, characters: Sequence[str]) -> dict[str, str] | None:
    """What causal models write after the same beginning; None where tokens are no characters."""
    ids = test.fetch(torch.arange(1), None).inputs
    ids = ids.get("input_ids") if isinstance(ids, Mapping) else ids
    if not isinstance(ids, Tensor) or not characters or any(len(c) != 1 for c in characters):
        return None
    prompt, window = ids[0, :PROMPT], ids.shape[1]

    def shown(tokens: Tensor) -> str:
        return "".join(characters[i] for i in tokens.tolist())

    texts = {role: (shown(prompt), shown(continued(m, prompt, WRITTEN, window))) for role, m in models.items()}
    caption = f"After the first {len(prompt)} characters of the test text, drawn with the same random numbers."
    return {"title": "What the models write", "caption": caption, "png": texts_png(texts)}


def sparse_speed(dense: nn.Module, sparse: nn.Module, inputs: Any, repeats: int = 15) -> dict[str, float]:
    """Latency of a batch and of a single sample when zeros are skipped, as ratios to dense execution of the same weights."""
    found = {}
    for name, sample in (("sparse_latency_ratio", inputs), ("sparse_single_ratio", _first(inputs))):
        found[name] = measure_latency({"dense": dense, "sparse": sparse}, sample, repeats=repeats)["sparse"]["ratio"]
    return found


def _first(inputs: Any) -> Any:
    from limbeck.core.batch import map_tensors

    return map_tensors(inputs, lambda t: t[:1])


def judge_sparse(
    models: Mapping[str, nn.Module],
    sparse: nn.Module,
    shares: Mapping[str, float],
    sparsity: float,
    history: Tensor,
    test: Data,
    class_names: Sequence[str] | None,
    told: Mapping[str, Any],
) -> dict[str, Any]:
    """A sparse student and its dense teacher side by side, with how fast zeros are skipped, and pictures.

    Args:
        models: ``student`` with exact zeros, and ``teacher``.
        sparse: the student in sparse execution.
        shares: zeros by name of weight. sparsity: over all of them.
        history: see :func:`loss_picture`.
        test, class_names: where and in which words they are judged; classes of single characters are shown as text.
        told: ``shift``, ``complete`` and ``perplexity`` of :func:`limbeck.tasks.judging_language.judge_language_models`; ignored for classifiers.
    """
    tokens = of_tokens(test)
    result = judge_language_models(models, test, **told) if tokens else judge_classifiers(models, test, class_names)
    result["rows"][0]["sparsity"] = sparsity
    inputs = told["complete"](test.fetch(torch.arange(min(8, len(test))), None)).inputs
    result.update(sparse_speed(models["student"], sparse, inputs))
    pictures = [layer_picture(shares)]
    if tokens:
        layers = [name.removesuffix(".weight") for name in shares]
        asked = {**told, "perplexity": False}
        dense = one_shot_curve(models["teacher"], layers, lambda m: token_measures(m, test, **asked)["nll"])
        student = (sparsity, result["rows"][0]["nll"])
        pictures.append(loss_picture(dense, student, history, "NLL for each token, nats"))
    if tokens and told["shift"] and class_names is not None:
        text = text_picture({"dense": models["teacher"], "sparse": models["student"]}, test, class_names)
        pictures += [] if text is None else [text]
    result["pictures"] = pictures + result.get("pictures", [])
    return result


def of_tokens(data: Data) -> bool:
    """Whether the labels of a data set are those of tokens."""
    labels = data.fetch(torch.arange(1), None).labels
    return labels is not None and labels.ndim > 1 and not labels.is_floating_point()
