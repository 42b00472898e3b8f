"""One row per sample for a whole data set: features, raw pixels, loss gradients at the last layer, or texts by their words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.blocks.encoders import Encoder, Pooling, pooled
from limbeck.blocks.taps import Tap, Taps
from limbeck.core.batch import call_model, first_tensor, logits_of
from limbeck.core.data import Data, as_data
from limbeck.core.errors import InputError


@torch.no_grad()
def embed(
    model: nn.Module, data: Any, *, layer: str | Tap | None = None, pooling: Pooling = "mean", batch_size: int = 512
) -> Tensor:
    """Features of every sample, unaugmented, in order.

    Args:
        model: an encoder or classifier; it is asked in evaluation mode, and left in the mode it was in.
        data: what :func:`limbeck.core.data.as_data` takes.
        layer: a tapped layer by module path (:mod:`limbeck.blocks.taps`). None: what :class:`limbeck.blocks.encoders.Encoder` gives:
            ``embed`` of this library's networks, else the output. :func:`penultimate` finds the input of a classifier's head.
        pooling: of maps and tokens: ``mean`` over positions, or ``flatten``.
        batch_size: samples at a time.

    Returns:
        (N, D) float32, on the CPU.

    Raises:
        InputError, UnknownNameError: no such layer, or no features in it.
    """
    encoder = Encoder(model, pooling)
    taps = None if layer is None else Taps(model, layer)
    rows = []
    with evaluating(model):
        for batch in _batches(model, as_data(data), batch_size):
            if taps is None:
                features = call_model(encoder, batch.inputs)
            else:
                with taps as tapped:
                    call_model(model, batch.inputs)
                features = pooled(next(iter(tapped.values())), pooling)
            rows.append(features.float().cpu())
    return torch.cat(rows)


def penultimate(model: nn.Module) -> Tap:
    """A tap on what a classifier's head takes: ``head_path`` where the model says so, else its last linear layer.

    Raises:
        InputError: there is no linear layer.
    """
    said = getattr(model, "head_path", None)
    names = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    if not isinstance(said, str) and not names:
        raise InputError(f"{type(model).__name__} has no linear layer to take the features of: name a layer")
    return Tap(said if isinstance(said, str) else names[-1], io="input")


@torch.no_grad()
def gradient_embedding(
    model: nn.Module,
    data: Any,
    labels: Tensor | None = None,
    *,
    double_softmax: bool = False,
    head: str | Tap | None = None,
    batch_size: int = 512,
) -> Tensor:
    """The gradient of each sample's loss at the last linear layer: by its bias, then by its weights, class after class.

    With logits z, penultimate features h and the loss L = CE(z, y), a row is [g, g ⊗ h], g = dL/dz = softmax(z) - onehot(y). The
    authors' code takes the cross-entropy of softmax(z) instead, which applies the softmax twice; then, with q = softmax(z) and
    r = softmax(q) - onehot(y), g = q ∘ (r - <q, r>).

    Args:
        model: a classifier, in evaluation mode while it is asked.
        data: what :func:`limbeck.core.data.as_data` takes.
        labels: (N,) int64. None: those of the data, or where it has none, the predicted classes (our decision).
        double_softmax: as the authors' code.
        head: a tap on the features; None: :func:`penultimate`.
        batch_size: samples at a time.

    Returns:
        (N, C (1 + D)) float32, on the CPU: 4 C (1 + D) bytes per sample.

    Raises:
        InputError: no features, or labels that do not fit.

    Source: "Dataset Quantization" (2023), as implemented by its authors.
    """
    data = as_data(data)
    if labels is not None and len(labels) != len(data):
        raise InputError(f"{len(data)} samples but {len(labels)} labels: they must be as many")
    tap = penultimate(model) if head is None else Tap.of(head)
    taps = Taps(model, tap)
    rows = []
    start = 0
    with evaluating(model):
        for batch in _batches(model, data, batch_size):
            with taps as tapped:
                z = logits_of(call_model(model, batch.inputs)).float()
            h = pooled(next(iter(tapped.values()))).float()
            y = batch.labels if labels is None else labels[start : start + len(z)]
            start += len(z)
            rows.append(_gradients(z, h, z.argmax(1) if y is None else y.to(z.device), double_softmax).cpu())
    return torch.cat(rows)


def _gradients(z: Tensor, h: Tensor, y: Tensor, double_softmax: bool) -> Tensor:
    if y.ndim != 1 or y.is_floating_point() or int(y.max()) >= z.shape[1] or int(y.min()) < 0:
        raise InputError(f"the gradient embedding needs class indices below {z.shape[1]}, one per sample")
    truth = F.one_hot(y, z.shape[1]).to(z)
    q = torch.softmax(z, 1)
    if double_softmax:
        r = torch.softmax(q, 1) - truth
        g = q * (r - (q * r).sum(1, keepdim=True))
    else:
        g = q - truth
    return torch.cat([g, (g[:, :, None] * h[:, None]).flatten(1)], 1)


def raw_pixels(data: Any, *, centred: bool = True, batch_size: int = 4096) -> Tensor:
    """The first tensor of every sample's inputs as a flat row, the mean over the data set taken off.

    Returns:
        (N, D) float32.

    Raises:
        InputError: no tensor among the inputs.
    """
    rows = []
    for batch in as_data(data).batches(batch_size):
        found = first_tensor(batch.inputs)
        if found is None:
            raise InputError("the inputs hold no tensor")
        rows.append(found.flatten(1).float().cpu())
    flat = torch.cat(rows)
    return flat - flat.mean(0, dtype=torch.float64).float() if centred else flat


class TextEmbedder:
    """Texts by their words and pairs of words: TF-IDF (sublinear counts), reduced by truncated SVD (latent semantic analysis).

    Args:
        dimensions: at most so many; fewer where the texts or their vocabulary are fewer.
        seed: of the randomised SVD.
    """

    def __init__(self, dimensions: int = 128, *, seed: int = 0) -> None:
        self.dimensions, self.seed = dimensions, seed
        self._counts: Any = None
        self._reduce: Any = None

    def fit(self, texts: Sequence[str]) -> TextEmbedder:
        """Learn the vocabulary, its weights and the directions.

        Raises:
            InputError: no strings, or no words in any of them.
        """
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        if isinstance(texts, str) or not len(texts) or not all(isinstance(t, str) for t in texts):
            raise InputError("text embeddings need a list of strings, with at least one")
        self._counts = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), max_features=50_000)
        try:
            rows = self._counts.fit_transform(texts)
        except ValueError as error:
            raise InputError(f"the texts cannot be embedded: {str(error).splitlines()[0]}") from None
        self._reduce = TruncatedSVD(min(self.dimensions, *rows.shape), random_state=self.seed).fit(rows)
        return self

    def transform(self, texts: Sequence[str]) -> Tensor:
        """(N, D) float32 rows of length 1; a text without known words gives a row of zeros.

        Raises:
            InputError: not fitted yet.
        """
        if self._reduce is None:
            raise InputError("fit the text embedder to texts first")
        rows = self._reduce.transform(self._counts.transform(texts))
        return F.normalize(torch.from_numpy(rows).float(), dim=1)


def text_embeddings(texts: Sequence[str], dimensions: int = 128, *, seed: int = 0) -> Tensor:
    """(N, D) float32 rows of N texts by a :class:`TextEmbedder` fitted to them."""
    return TextEmbedder(dimensions, seed=seed).fit(texts).transform(texts)


def instruction_text(record: Mapping[str, Any] | str) -> str:
    """The text of one instruction record: instruction, input and output, one a line, without empty ones; a string is itself.

    Raises:
        InputError: no instruction and no output in it.
    """
    if isinstance(record, str):
        return record
    if not isinstance(record, Mapping) or not ({"instruction", "output"} & record.keys()):
        raise InputError("an instruction record has the fields instruction, input and output, or is a string")
    parts = (record.get(name) for name in ("instruction", "input", "output"))
    return "\n".join(str(p) for p in parts if p)


def read_instructions(path: str | Path) -> list[dict[str, Any]]:
    """Records of an instruction file: a JSON list, or one JSON object a line.

    Raises:
        InputError: no such file, or no records in it.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else [json.loads(s) for s in text.splitlines() if s]
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is no JSON list and no JSON lines: {error}") from None
    if not found or not all(isinstance(r, dict) for r in found):
        raise InputError(f"{path} holds no list of records with instruction, input and output")
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module's own flag is put back afterwards."""
    flags = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training


def _batches(model: nn.Module, data: Data, batch_size: int) -> Iterator[Any]:
    parameter = next(model.parameters(), None)
    for batch in data.batches(batch_size):
        yield batch if parameter is None else batch.to(parameter.device)
