r"""New weights for the edges of message passing, from scores of the edges: a softmax over what arrives at each node.

.. math:: A_{ij} \leftarrow A^0_{ij} + \alpha \,\mathrm{softmax}_{j \in N_i}(s_{ij}) \sum_l A^0_{il}.

The support stays, and what is added at a node sums to :math:`\alpha` times its original sum.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.core.errors import InputError


def segment_softmax(scores: Tensor, segments: Tensor, count: int) -> Tensor:
    """Softmax of scores (E,) over those with the same segment (E,), in any order; ``count`` segments, some perhaps without scores."""
    top = torch.full((count,), -torch.inf, dtype=scores.dtype, device=scores.device)
    top = top.scatter_reduce(0, segments, scores, "amax")
    raised = (scores - top[segments]).exp()
    total = torch.zeros(count, dtype=scores.dtype, device=scores.device).index_add_(0, segments, raised)
    return raised / total[segments]


def reweighted(
    base: Tensor, scores: Tensor, targets: Tensor, count: int, alpha: float, *, current: Tensor | None = None
) -> Tensor:
    """The new weights (E,).

    Args:
        base: (E,) the original weights.
        scores: (E,) how likely each edge is.
        targets: (E,) the node at which each edge arrives.
        count: N.
        alpha: how much is added, 0 or more.
        current: the weights to add to; None: the original ones, so that steps do not pile up.

    Raises:
        InputError: lengths that differ, alpha below 0, scores that are not finite.
    """
    if not base.shape == scores.shape == targets.shape:
        raise InputError(f"{len(base)} edges need as many scores and targets, not {len(scores)} and {len(targets)}")
    if alpha < 0:
        raise InputError(f"alpha is 0 or more, not {alpha}: weights must not fall below the original ones")
    if not bool(torch.isfinite(scores).all()):
        raise InputError("the scores of edges hold NaN or infinity: the encoder or the predictor is broken")
    start = base if current is None else current
    if alpha == 0:
        return start.clone()
    total = torch.zeros(count, dtype=base.dtype, device=base.device).index_add_(0, targets, base)
    return start + alpha * segment_softmax(scores.to(base.dtype), targets, count) * total[targets]


class MessageGraph(nn.Module):
    """The sparse matrix of message passing, whose entries can be given other values and found again.

    Args:
        adjacency: (N, N) in CSR form; row i holds what arrives at node i.

    Attributes:
        base: (E,) the original entries. weights: (E,) those in use, part of the state.
        rows, columns: (E,) where they are.
    """

    base: Tensor
    weights: Tensor
    pointer: Tensor
    columns: Tensor
    rows: Tensor

    def __init__(self, adjacency: Tensor) -> None:
        super().__init__()
        pointer = adjacency.crow_indices()
        self.count = len(pointer) - 1
        rows = torch.repeat_interleave(torch.arange(self.count, device=pointer.device), pointer.diff())
        self.register_buffer("pointer", pointer, persistent=False)
        self.register_buffer("columns", adjacency.col_indices(), persistent=False)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("base", adjacency.values(), persistent=False)
        self.register_buffer("weights", adjacency.values().clone())

    def matrix(self, *, original: bool = False) -> Tensor:
        """The matrix (N, N) with the weights in use, or the original ones."""
        values = self.base if original else self.weights
        size = (self.count, self.count)
        return torch.sparse_csr_tensor(self.pointer, self.columns, values, size, check_invariants=False)

    def reweight(self, scores: Tensor, alpha: float, *, accumulate: bool = False) -> None:
        """Replace the weights; see :func:`reweighted`. ``accumulate``: add to those in use and not to the original ones."""
        current = self.weights if accumulate else None
        new = reweighted(self.base, scores, self.rows, self.count, alpha, current=current)
        self.weights.copy_(new)

    def neighbours(self, *, original: bool = False) -> tuple[Tensor, Tensor]:
        """(2, M) from neighbour to node, and (M,) their weights, without self loops."""
        apart = self.rows != self.columns
        values = self.base if original else self.weights
        return torch.stack([self.columns, self.rows])[:, apart], values[apart]
