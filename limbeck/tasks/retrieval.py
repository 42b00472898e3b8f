"""How retrieval models are judged: what they find in the test pool, and what encoding a document costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch, call_model
from limbeck.core.data import Data
from limbeck.core.errors import InputError
from limbeck.metrics.retrieval import retrieval_metrics
from limbeck.tasks.judging import costs

SIDES = ("query", "document", "other")


def sides_of(batch: Batch) -> dict[str, Any]:
    """A batch of pairs as inputs by name: ``query``, ``document``, and ``other`` where there is a second document.

    Taken are mappings with these names, and pairs or triples ``(query, document[, other])`` of inputs.

    Raises:
        InputError: neither.
    """
    inputs = batch.inputs
    if isinstance(inputs, Mapping) and {"query", "document"} <= inputs.keys() <= set(SIDES):
        return dict(inputs)
    if isinstance(inputs, tuple | list) and 2 <= len(inputs) <= 3 and batch.labels is None:
        return dict(zip(SIDES, inputs, strict=False))
    if isinstance(batch.labels, Mapping):  # (query, document), which reads like (inputs, labels)
        return {"query": inputs, "document": batch.labels}
    raise InputError(
        "a batch of pairs is {'query': …, 'document': …} or (query, document), each as the encoder takes it "
        "({'input_ids': …, 'attention_mask': …})"
    )


@torch.no_grad()
def embeddings(model: nn.Module, data: Data, side: str, batch_size: int = 128, most: int | None = None) -> Any:
    """Embeddings (N, d) of one side of all pairs, on the CPU; a dict of them where the model has several exits.

    Args:
        model: in evaluation mode during the call; its mode is put back.
        data: batches of pairs.
        side: ``query``, ``document`` or ``other``.
        most: only the first so many pairs.
    """
    device = next(model.parameters()).device
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    found: list[Any] = []
    try:
        count = len(data) if most is None else min(most, len(data))
        for start in range(0, count, batch_size):
            batch = data.fetch(torch.arange(start, min(start + batch_size, count)), None).to(device)
            found.append(call_model(model, sides_of(batch)[side]))
    finally:
        for module, training in flags:
            module.training = training
    if isinstance(found[0], Tensor):
        return torch.cat([v.float().cpu() for v in found])
    return {key: torch.cat([v[key].float().cpu() for v in found]) for key in found[0]}


def search(model: nn.Module, data: Data, *, code: bool = True, most: int | None = None) -> Any:
    """Each query looks for its document among all documents of a data set: reciprocal rank, recall, discounted gain.

    Args:
        model: gives embeddings, or a dict of them by exit.
        data: batches of pairs.
        code: also let every second way of writing a document look for it, where there are any (``code_…``).
        most: only the first so many pairs.

    Returns:
        the measures, or a dict of them by exit.
    """
    sample = sides_of(data.fetch(torch.arange(1), None))
    document = embeddings(model, data, "document", most=most)
    sides = {"": embeddings(model, data, "query", most=most)}
    if code and "other" in sample:
        sides["code_"] = embeddings(model, data, "other", most=most)

    def measured(pick: Any) -> dict[str, float]:
        return {
            prefix + name: value
            for prefix, queries in sides.items()
            for name, value in retrieval_metrics(pick(queries), pick(document)).items()
        }

    if isinstance(document, Tensor):
        return measured(lambda v: v)
    return {exit: measured(lambda v, exit=exit: v[exit]) for exit in document}


class _Documents(Data):
    """The documents of any data of pairs, as inputs of an encoder."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def fetch(self, index: Tensor, view: int | None) -> Batch:
        return Batch(sides_of(self.data.fetch(index, None))["document"], None, index, view)


def judge_retrieval(models: Mapping[str, nn.Module], test: Data) -> dict[str, Any]:
    """Measure several encoders on the same pool.

    Args:
        models: by role, from inputs to embeddings (B, d); latency ratios are to the first.
        test: pairs; all documents are the pool.

    Returns:
        ``rows``: for each model MRR@10, recall@1 and @10, NDCG@10, code to code too where there are second documents, and the cost
        of encoding documents: parameters, bytes, FLOPs, latency; ``pool``: how many documents are searched.
    """
    price = costs(models, _Documents(test))
    rows = [{"who": role, **search(model, test), **price[role]} for role, model in models.items()]
    return {"rows": rows, "pool": len(test)}
