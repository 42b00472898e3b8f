"""One-shot pruners: which weights of a layer go, by size or by what their loss costs the layer's output.

A layer is seen as a matrix W (out, in): ``y = W x``. Layers are cut one by one, each to the same share, so none can be emptied for another's sake.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import InputError

_NM = re.compile(r"(\d+):(\d+)")


@dataclass(frozen=True)
class Pattern:
    """What part of a layer's weights goes, and where it may lie.

    Attributes:
        sparsity: share of zeros, in [0, 1).
        keep, of: with n:m sparsity, ``keep`` of every ``of`` consecutive weights of a row stay; 0 for unstructured sparsity.

    Raises:
        InputError: ``sparsity`` outside [0, 1).
    """

    sparsity: float
    keep: int = 0
    of: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise InputError(f"sparsity must be in [0, 1), the share of weights that go (got {self.sparsity:g})")

    @classmethod
    def parse(cls, value: str | float) -> Pattern:
        """From a share (0.75) or from ``n:m`` (``2:4``: two of four stay).

        Raises:
            InputError: neither of them.
        """
        if isinstance(value, str):
            found = _NM.fullmatch(value.strip())
            if found is not None:
                keep, of = map(int, found.groups())
                if not 0 < keep <= of:
                    raise InputError(f"a pattern n:m keeps n of m weights, 0 < n <= m (got {value})")
                return cls(1 - keep / of, keep, of)
            try:
                value = float(value)
            except ValueError:
                raise InputError(f"sparsity is a share such as 0.75 or a pattern such as 2:4 (got '{value}')") from None
        return cls(float(value))

    @property
    def structured(self) -> bool:
        return self.of > 0

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}" if self.structured else f"{self.sparsity:g}"


# ---- layers as matrices ----------------------------------------------------------------------------------------------


def transposed(layer: nn.Module) -> bool:
    """Whether a layer keeps its matrix as (in, out), as the ``Conv1D`` of 🤗 transformers' GPT-2 does."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def prunable(layer: nn.Module) -> bool:
    """Linear and convolutional layers, and those of :func:`transposed`, whose weight is a parameter of their own."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return (isinstance(layer, kinds) or transposed(layer)) and isinstance(getattr(layer, "weight", None), nn.Parameter)


def as_matrix(layer: nn.Module) -> Tensor:
    """The weight as (out, in), without gradient; a view of it wherever it can be one."""
    weight: Any = layer.weight
    return weight.detach().T if transposed(layer) else weight.detach().flatten(1)


def from_matrix(layer: nn.Module, matrix: Tensor) -> Tensor:
    """A matrix (out, in) in the shape of the layer's weight."""
    weight: Any = layer.weight
    return matrix.T.contiguous() if transposed(layer) else matrix.reshape(weight.shape)


# ---- by a score ------------------------------------------------------------------------------------------------------


def lowest(scores: Tensor, pattern: Pattern, kept: Tensor | None = None) -> Tensor:
    """Where the lowest scores are: what is to go.

    Exactly ``round(sparsity * size)`` entries (of equal ones the earlier), or all but ``keep`` of every ``of`` consecutive ones of a row. What has gone
    before goes first, and stays away even if it was more.

    Args:
        scores: (out, in).
        kept: bool (out, in), what is still there; None: everything.

    Returns:
        bool (out, in).

    Raises:
        InputError: with n:m, rows that m does not divide.
    """
    if kept is not None:
        scores = scores.masked_fill(~kept, -torch.inf)
    gone = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    if pattern.structured:
        if scores.shape[1] % pattern.of:
            raise InputError(f"{pattern} sparsity needs rows that {pattern.of} divides, not {scores.shape[1]} inputs")
        order = scores.reshape(-1, pattern.of).argsort(dim=1, stable=True)[:, : pattern.of - pattern.keep]
        gone.view(-1, pattern.of).scatter_(1, order, True)
    else:
        gone[scores.flatten().argsort(stable=True)[: round(pattern.sparsity * scores.numel())]] = True
    gone = gone.view(scores.shape)
    return gone if kept is None else gone | ~kept


def magnitude(weight: Tensor, pattern: Pattern, kept: Tensor | None = None) -> Tensor:
    """Bool (out, in): the weights that stay when the smallest go."""
    return ~lowest(weight.abs(), pattern, kept)


def fast_obc(
    weight: Tensor,
    gram: Tensor,
    pattern: Pattern,
    kept: Tensor | None = None,
    *,
    block: int = 128,
    damp: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Prune a layer and mend what stays, so that its outputs on the calibration inputs change little.

    With H = X X^T + damp · mean(diag) · I and U the upper Cholesky factor of its inverse, columns are taken from left to right. In each block of them the
    entries with the lowest ``w² / U_ii²`` go; the error ``(w - q) / U_ii`` of column i is made up for by the columns after it.

    Args:
        weight: (out, in).
        gram: (in, in) sum of x x^T over the calibration inputs.
        kept: bool (out, in), what is still there; None: everything. Nothing comes back.
        block: columns that are decided on together; with n:m it is rounded to a multiple of m.
        damp: of the diagonal, relative to its mean.

    Returns:
        the new weight, and bool (out, in) of what stays.

    Raises:
        InputError: shapes that do not fit, no inputs at all, or as :func:`lowest`.

    Source: "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (2023).
    """
    columns = weight.shape[1]
    if gram.shape != (columns, columns):
        raise InputError(f"inputs of {len(gram)} features do not belong to a layer that takes {columns}")
    w = weight.double().clone()
    h = gram.double().clone()
    diagonal = h.diagonal()
    dead = diagonal == 0
    if bool(dead.all()):
        raise InputError("the calibration inputs of a layer are all 0: nothing can be told from them")
    diagonal[dead] = 1
    w[:, dead] = 0
    diagonal += damp * diagonal[~dead].mean()
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    stays = torch.ones_like(w, dtype=torch.bool)
    if pattern.structured:
        if columns % pattern.of:
            lowest(w, pattern)  # says what is wrong
        block = max(block // pattern.of, 1) * pattern.of
    for start in range(0, columns, block):
        end = min(start + block, columns)
        part, factor = w[:, start:end], upper[start:end, start:end]
        before = None if kept is None else kept[:, start:end]
        errors = torch.zeros_like(part)
        if not pattern.structured:
            stays[:, start:end] = ~lowest((part / factor.diagonal()).square(), pattern, before)
        for i in range(end - start):
            if pattern.structured and i % pattern.of == 0:
                group = slice(i, i + pattern.of)
                scores = (part[:, group] / factor.diagonal()[group]).square()
                stays[:, start + i : start + i + pattern.of] = ~lowest(
                    scores, pattern, None if before is None else before[:, group]
                )
            column = part[:, i]
            pruned = torch.where(stays[:, start + i], column, 0.0)
            errors[:, i] = (column - pruned) / factor[i, i]
            part[:, i:] -= errors[:, i : i + 1] * factor[i, i:]
            part[:, i] = pruned
        w[:, end:] -= errors @ upper[start:end, end:]
    return w.masked_fill(~stays, 0.0).to(weight.dtype), stays


# ---- calibration -----------------------------------------------------------------------------------------------------


@contextmanager
def collected_grams(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """While it is open, sums up x x^T over everything that the layers take; by layer name (in, in), in float64.

    Positions of sequences count one by one; convolutions see unfolded patches.

    Raises:
        InputError: a layer with groups, whose outputs see different inputs, or a convolution over other than two axes.
    """
    grams: dict[str, Tensor] = {}

    def listen(name: str, layer: Any) -> Callable[..., None]:
        if getattr(layer, "groups", 1) != 1:
            raise InputError(f"layer '{name}' has groups, which cannot be cut by calibration: prune it by magnitude")

        def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = _rows(name, layer, inputs[0].detach()).double()
            grams[name] = grams[name] + x.T @ x if name in grams else x.T @ x

        return note

    handles = [layer.register_forward_pre_hook(listen(name, layer)) for name, layer in layers.items()]
    try:
        yield grams
    finally:
        for handle in handles:
            handle.remove()


def _rows(name: str, layer: Any, x: Tensor) -> Tensor:
    """(positions, in) of what a layer multiplies its matrix with."""
    if isinstance(layer, nn.Conv2d) and not isinstance(layer.padding, str) and layer.padding_mode == "zeros":
        patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return patches.transpose(1, 2).flatten(0, 1)
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise InputError(f"layer '{name}' is a convolution that cannot be cut by calibration: prune it by magnitude")
    return x.flatten(0, -2)


def calibrated(
    layers: Mapping[str, nn.Module], groups: Sequence[Sequence[str]], run: Callable[[], None]
) -> Iterator[dict[str, Tensor]]:
    """The sums of :func:`collected_grams`, group after group: each is collected when those before it have been pruned.

    Args:
        layers: by name.
        groups: their names, in the order of the forward pass.
        run: a forward pass of all calibration inputs.

    Raises:
        InputError: a layer that the forward pass does not call.
    """
    for group in groups:
        with collected_grams({name: layers[name] for name in group}) as grams, torch.no_grad():
            run()
        missed = [name for name in group if name not in grams]
        if missed:
            raise InputError(f"layer '{missed[0]}' is not called on the calibration inputs: leave it out (keep=…)")
        yield grams


def check_prunable(layers: Mapping[str, nn.Module], pattern: Pattern, owners: Iterable[tuple[str, nn.Module]]) -> None:
    """That each layer can be cut to a pattern.

    Args:
        layers: by name.
        owners: all modules of the network by name: a weight that one of them shares cannot be cut alone.

    Raises:
        InputError: rows that do not divide, a layer of which nothing would be left, or a shared weight.
    """
    mine = {id(layer.weight): name for name, layer in layers.items()}
    for other, module in owners:
        for parameter in module.parameters(recurse=False):
            name = mine.get(id(parameter))
            if name is not None and other != name and other not in layers:
                raise InputError(
                    f"layer '{name}' shares its weight with '{other}' and cannot be cut alone: leave it out (keep=…)"
                )
    for name, layer in layers.items():
        matrix = as_matrix(layer)
        if pattern.structured and matrix.shape[1] % pattern.of:
            raise InputError(
                f"layer '{name}' has {matrix.shape[1]} inputs, which {pattern.of} does not divide: {pattern} sparsity cannot cut it; leave it out (keep=…)"
            )
        if round(pattern.sparsity * matrix.numel()) == matrix.numel():
            raise InputError(f"sparsity {pattern} leaves nothing of layer '{name}' with its {matrix.numel()} weights")
