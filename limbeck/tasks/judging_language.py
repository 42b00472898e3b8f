"""How models of tokens are judged side by side: likelihood, accuracy and agreement for each token, batch after batch, and what they cost."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch, call_model, logits_of
from limbeck.core.data import Data
from limbeck.core.errors import InputError
from limbeck.losses.tokens import IGNORED, token_rows
from limbeck.tasks.judging import costs

ROWS = 4096
"""Token positions whose probabilities are held at once."""


class TokenScore:
    """Running sums over the labelled tokens of a data set; logits are given up as soon as they are counted."""

    def __init__(self) -> None:
        self.tokens, self.nll, self.right = 0, 0.0, 0

    def add(self, rows: Tensor, labels: Tensor) -> None:
        """Logits (R, C) and labels (R,)."""
        for logits, targets in zip(rows.split(ROWS), labels.split(ROWS), strict=True):
            log_p = torch.log_softmax(logits.double(), -1)
            self.nll -= float(log_p.gather(1, targets[:, None]).sum())
            self.right += int((log_p.argmax(1) == targets).sum())
        self.tokens += len(rows)

    def measures(self, perplexity: bool = True) -> dict[str, float]:
        """``nll`` (nats for each token), ``accuracy``, and where asked ``perplexity``, its exponential.

        Raises:
            InputError: no token had a label.
        """
        if not self.tokens:
            raise InputError("no token of the data has a label: there is nothing to judge")
        nll = self.nll / self.tokens
        found = {"nll": nll, "accuracy": self.right / self.tokens}
        return {**found, "perplexity": math.exp(min(nll, 700.0))} if perplexity else found


@torch.no_grad()
def token_measures(
    model: nn.Module, data: Data, *, shift: bool, batch_size: int = 32, complete: Any = None, perplexity: bool = True
) -> dict[str, float]:
    """Likelihood and accuracy of one model over a data set, in evaluation mode; its own mode is put back.

    Args:
        model: gives logits (B, N, C).
        data: with labels (B, N).
        shift: the logits at a place are about the next one's label.
        batch_size: sequences at once.
        complete: applied to each batch before.
        perplexity: whether it is asked for.
    """
    score = TokenScore()
    device, was_training = _device(model), model.training
    model.eval()
    for batch in data.batches(batch_size):
        batch = (batch if complete is None else complete(batch)).to(device)
        score.add(*token_rows(logits_of(call_model(model, batch.inputs)), _labels(batch), shift))
    model.train(was_training)
    return score.measures(perplexity)


def check_token_teacher(teacher: nn.Module, data: Data, *, shift: bool, complete: Any = None) -> float:
    """A teacher's accuracy for each token; warns where always saying the most frequent one would be as good."""
    accuracy = token_measures(teacher, data, shift=shift, complete=complete, perplexity=False)["accuracy"]
    labels = [_labels(batch)[:, 1 if shift else 0 :].flatten() for batch in data.batches()]
    counts = torch.cat([part[part != IGNORED] for part in labels]).bincount()
    chance = float(counts.max() / counts.sum())
    if accuracy <= chance:
        warnings.warn(
            f"the teacher is right about {accuracy:.1%} of the validation tokens, no better than always saying one ({chance:.1%}): "
            "check its weights and its tokenizer",
            stacklevel=2,
        )
    return accuracy


@torch.no_grad()
def compare_language_models(
    models: Mapping[str, nn.Module],
    test: Data,
    *,
    shift: bool,
    batch_size: int = 32,
    complete: Any = None,
    perplexity: bool = True,
) -> dict[str, Any]:
    """What several models say of the same tokens, without holding the logits of more than a batch.

    Args:
        models: by role; the first is compared with the mean of all whose role begins with ``teacher``.
        test, shift, batch_size, complete, perplexity: see :func:`token_measures`.

    Returns:
        ``rows``: for each model likelihood and accuracy for each token; ``agreement``: share of tokens for which first model and teachers have the same
        favourite, and ``kl``, their divergence in nats for each token.
    """
    modes = {role: m.training for role, m in models.items()}
    for model in models.values():
        model.eval()
    scores = {role: TokenScore() for role in models}
    first = next(iter(models))
    teachers = [role for role in models if role.startswith("teacher")]
    same, divergence = 0, 0.0
    for batch in test.batches(batch_size):
        batch = (batch if complete is None else complete(batch)).to(_device(models[first]))
        said = {}
        for role, model in models.items():
            logits, labels = token_rows(logits_of(call_model(model, batch.inputs)), _labels(batch), shift)
            scores[role].add(logits, labels)
            if role == first or role in teachers:
                said[role] = logits
        if teachers:
            taught = torch.stack([said[role] for role in teachers]).mean(0)
            same += int((taught.argmax(1) == said[first].argmax(1)).sum())
            divergence += _divergence(taught, said[first])
    for role, model in models.items():
        model.train(modes[role])
    result: dict[str, Any] = {"rows": [{"who": role, **scores[role].measures(perplexity)} for role in models]}
    if teachers:
        count = scores[first].tokens
        result["agreement"] = {"top1_agreement": same / count, "kl": divergence / count}
    return result


def judge_language_models(models: Mapping[str, nn.Module], test: Data, **told: Any) -> dict[str, Any]:
    """:func:`compare_language_models`, and in each row parameters, bytes, FLOPs for a sequence, and the latency of 64 sequences."""
    result = compare_language_models(models, test, **told)
    complete = told.get("complete")
    price = costs(models, test if complete is None else _Completed(test, complete))
    result["rows"] = [{**row, **price[row["who"]]} for row in result["rows"]]
    return result


@torch.no_grad()
def continued(
    model: nn.Module, prompt: Tensor, length: int, window: int, *, seed: int = 0, temperature: float = 0.8
) -> Tensor:
    """(length,) tokens that a causal model draws after a prompt (N,), seeing at most ``window`` tokens.

    The same seed gives the same uniform numbers, so that two models that nearly agree write nearly the same.
    """
    draws = torch.rand(length, generator=torch.Generator().manual_seed(seed))
    ids, was_training = prompt.to(_device(model)), model.training
    model.eval()
    for draw in draws:
        logits = logits_of(model(ids[None, -window:]))[0, -1].double().cpu()
        cumulated = torch.softmax(logits / temperature, -1).cumsum(-1)
        drawn = torch.searchsorted(cumulated, draw.double() * cumulated[-1]).clamp_max(len(cumulated) - 1)
        ids = torch.cat([ids, drawn.to(ids.device)[None]])
    model.train(was_training)
    return ids[len(prompt) :].cpu()


def _divergence(teacher: Tensor, student: Tensor) -> float:
    """Sum over rows of KL(teacher, student), in nats."""
    total = 0.0
    for t, s in zip(teacher.split(ROWS), student.split(ROWS), strict=True):
        log_t = torch.log_softmax(t.double(), -1)
        total += float((log_t.exp() * (log_t - torch.log_softmax(s.double(), -1))).sum())
    return total


def _device(model: nn.Module) -> torch.device:
    found = next((t for t in (*model.parameters(), *model.buffers())), None)
    return torch.device("cpu") if found is None else found.device


def _labels(batch: Batch) -> Tensor:
    if batch.labels is None:
        raise InputError("language models are judged by labels, and the data has none")
    return batch.labels


class _Completed(Data):
    """Data whose batches get what a model needs besides."""

    def __init__(self, data: Data, complete: Any) -> None:
        self.data, self.complete = data, complete

    def __len__(self) -> int:
        return len(self.data)

    def fetch(self, index: Tensor, view: int | None) -> Batch:
        found: Batch = self.complete(self.data.fetch(index, view))
        return found
