r"""A codebook: rows of features become the nearest of M codes, which follow the rows they are given by a running mean, not by a gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import InputError
from limbeck.losses.features import full_precision, unit_vectors

Similarity = Literal["cosine", "euclidean"]
CHUNK = 1 << 23
"""Similarities held at once where a search goes over all codes."""


@dataclass(frozen=True)
class Quantised:
    """What a codebook makes of rows.

    Attributes:
        values: (N, D); in training :math:`h + \\mathrm{sg}(q - h)`, whose gradient passes to h unchanged; else the codes q themselves.
        codes: (N,) int64, the number of each row's code.
        commitment: scalar, weight times :math:`\\mathrm{mean}((\\mathrm{sg}(q) - h)^2)`; its gradient goes to h alone.
    """

    values: Tensor
    codes: Tensor
    commitment: Tensor


class VectorQuantizer(nn.Module):
    r"""M codes of D numbers, for rows h (N, D).

    ``cosine``: codes have norm 1, :math:`S_{im} = \langle h_i/|h_i|, e_m\rangle`, and a training step with :math:`n_m` rows at code m moves it by

    .. math:: e_m \leftarrow \mathrm{norm}\big(d\,e_m + (1-d)\,\mathrm{norm}(\mathrm{mean}_{i:k_i=m}\, h_i/|h_i|)\big), \qquad n_m > 0.

    ``euclidean``: :math:`S_{im} = -|h_i - e_m|`, and with running counts :math:`N_m \leftarrow d N_m + (1-d) n_m` the codes are the running means

    .. math:: e_m \leftarrow e_m + \frac{(1-d)\,n_m}{N_m}\,\big(\mathrm{mean}_{i:k_i=m}\, h_i - e_m\big).

    Codes that no row chose stay. Rows enter detached, and only in training mode; the values given back are those of the codes before the step.
    All state (codes, running counts, whether k-means has been run) is in buffers, so that a resumed run goes on exactly.

    Args:
        dim: D.
        codes: M.
        similarity: ``cosine`` or ``euclidean``.
        decay: d in [0, 1).
        commitment: weight of the commitment loss, 0 or more.
        start: ``kaiming`` (uniform; rows of norm 1 with cosine) or ``kmeans`` on the first rows seen in training.
        refresh: codes whose running count is below this are put on random rows of the step, with this count; 0: never.
        chunk: similarities held at once in a search.

    Attributes:
        codebook: (M, D) float32.
        counts: (M,) running counts of rows.

    Raises:
        InputError: a number out of its range.

    Source: "Neural Discrete Representation Learning" (running means), "VQGraph: Rethinking Graph Representation Space for Bridging GNNs and MLPs"
    (cosine). Our decision: cosine codes are scaled back to norm 1 after each step.
    """

    codebook: Tensor
    counts: Tensor
    started: Tensor

    def __init__(
        self,
        dim: int,
        codes: int,
        *,
        similarity: Similarity = "cosine",
        decay: float = 0.8,
        commitment: float = 0.25,
        start: Literal["kaiming", "kmeans"] = "kaiming",
        refresh: float = 0.0,
        chunk: int = CHUNK,
    ) -> None:
        super().__init__()
        if dim < 1 or codes < 1 or chunk < 1:
            raise InputError(f"a codebook needs 1 code of 1 number at least (got {codes} of {dim})")
        if similarity not in ("cosine", "euclidean") or start not in ("kaiming", "kmeans"):
            raise InputError(
                f"a codebook is cosine or euclidean, from kaiming or kmeans, not {similarity} from {start}"
            )
        if not 0 <= decay < 1 or commitment < 0 or refresh < 0:
            raise InputError(
                f"a codebook's decay is in [0, 1), commitment and refresh 0 or more (got {decay}, {commitment}, {refresh})"
            )
        self.similarity, self.decay, self.commitment = similarity, decay, commitment
        self.start, self.refresh, self.chunk = start, refresh, chunk
        first = nn.init.kaiming_uniform_(torch.empty(codes, dim))
        self.register_buffer("codebook", F.normalize(first, dim=1) if similarity == "cosine" else first)
        self.register_buffer("counts", torch.zeros(codes))
        self.register_buffer("started", torch.tensor(start == "kaiming"))

    @property
    def num_codes(self) -> int:
        return len(self.codebook)

    def forward(self, h: Tensor) -> Quantised:
        """Rows (N, D) to codes; in training mode the codes follow.

        Raises:
            InputError: rows of another width.
        """
        h = self._checked(h)
        if self.training and not bool(self.started):
            self.start_from(h)
        codes = self.nearest(h)
        q = self.codebook[codes].to(h.dtype)
        commitment = self.commitment * F.mse_loss(h, q)
        if not self.training:
            return Quantised(q, codes, commitment)
        self._follow(h.detach(), codes)
        return Quantised(h + (q - h).detach(), codes, commitment)

    # ---- assignments -----------------------------------------------------------------------------------------------------

    def similarities(self, h: Tensor) -> Tensor:
        """S (N, M) of rows (N, D), differentiable with respect to the rows; the codes are constants."""
        return self._similar(self._checked(h), self.codebook)

    @torch.no_grad()
    def nearest(self, h: Tensor) -> Tensor:
        """(N,) the number of the most similar code, the lowest of several; at most ``chunk`` similarities are held."""
        return self.top(h, 1)[1][:, 0]

    @torch.no_grad()
    def top(self, h: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k most similar codes of each row: similarities (N, k), falling, and their numbers (N, k). Held are ``chunk`` at once."""
        h = self._checked(h)
        if not 1 <= k <= self.num_codes:
            raise InputError(f"k is from 1 to the {self.num_codes} codes (got {k})")
        width = min(self.num_codes, max(k, self.chunk))
        found = [self._top_of(part, k, width) for part in h.split(max(1, self.chunk // width))]
        if not found:
            return h.new_zeros(0, k), torch.zeros(0, k, dtype=torch.long, device=h.device)
        return torch.cat([v for v, _ in found]), torch.cat([c for _, c in found])

    def _top_of(self, h: Tensor, k: int, width: int) -> tuple[Tensor, Tensor]:
        best: tuple[Tensor, Tensor] | None = None
        for first in range(0, self.num_codes, width):
            similar = self._similar(h, self.codebook[first : first + width])
            if k == 1:
                values, codes = similar.max(1, keepdim=True)
            else:
                values, codes = similar.topk(min(k, similar.shape[1]), dim=1)
            codes = codes + first
            if best is not None:
                both = torch.cat([best[0], values], 1), torch.cat([best[1], codes], 1)
                values, place = both[0].sort(dim=1, descending=True, stable=True)
                values, codes = values[:, :k], both[1].gather(1, place[:, :k])
            best = values, codes
        assert best is not None
        return best

    def _similar(self, h: Tensor, codes: Tensor) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):  # cosines are divided by small temperatures
            if self.similarity == "cosine":
                return unit_vectors(h, 1) @ codes.to(h.dtype).T
            return -torch.cdist(h, codes.to(h.dtype))

    # ---- following the rows ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start_from(self, h: Tensor, rounds: int = 10) -> None:
        """Put the codes on the k-means centres of rows (N, D): ``rounds`` of Lloyd's algorithm from random rows (spherical with cosine).

        With cosine, rows of zeros have no say; where there are no others, nothing happens.
        """
        h = self._rows(self._checked(h))
        if not len(h):
            return
        some = torch.randperm(len(h), device=h.device)
        if len(h) < self.num_codes:  # fewer rows than codes: some twice
            some = torch.randint(len(h), (self.num_codes,), device=h.device)
        self.codebook.copy_(h[some[: self.num_codes]])
        for _ in range(rounds):
            codes = self.nearest(h)
            count, mean = self._means(h, codes)
            self.codebook.copy_(torch.where(count[:, None] > 0, mean, self.codebook))
        self.counts.copy_(torch.bincount(self.nearest(h), minlength=self.num_codes))
        self.started.fill_(True)

    @torch.no_grad()
    def _follow(self, h: Tensor, codes: Tensor) -> None:
        count, mean = self._means(h.to(self.codebook.dtype), codes)
        self.counts.lerp_(count, 1 - self.decay)
        used = count[:, None] > 0
        if self.similarity == "cosine":
            moved = F.normalize(torch.lerp(self.codebook, mean, 1 - self.decay), dim=1)
        else:
            share = (1 - self.decay) * count / self.counts.clamp_min(torch.finfo(self.counts.dtype).tiny)
            moved = self.codebook + share[:, None] * (mean - self.codebook)
        self.codebook.copy_(torch.where(used, moved, self.codebook))
        if self.refresh:
            self._refresh(h)

    def _refresh(self, h: Tensor) -> None:
        rare = (self.counts < self.refresh).nonzero()[:, 0]
        rows = self._rows(h)
        if not len(rare) or not len(rows):
            return
        some = torch.randint(len(rows), (len(rare),), device=h.device)
        self.codebook[rare] = rows[some]
        self.counts[rare] = self.refresh

    def _rows(self, h: Tensor) -> Tensor:
        """Rows as codes may be: with cosine those that have a direction, of norm 1."""
        h = h.to(self.codebook.dtype)
        if self.similarity == "euclidean":
            return h
        unit = unit_vectors(h, 1)
        return unit[unit.any(1)]

    def _means(self, rows: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """(M,) counts and (M, D) means of the rows of each code; norm 1 with cosine, and the code itself where its rows cancel out."""
        if self.similarity == "cosine":
            rows = unit_vectors(rows, 1)
        count = torch.bincount(codes, minlength=self.num_codes).to(rows.dtype)
        total = torch.zeros_like(self.codebook).index_add_(0, codes, rows)
        if self.similarity == "euclidean":
            return count, total / count.clamp_min(1)[:, None]
        direction = unit_vectors(total, 1)
        return count, torch.where(direction.any(1, keepdim=True), direction, self.codebook)

    # ---- use -------------------------------------------------------------------------------------------------------------

    def usage(self) -> dict[str, float]:
        """How evenly the codes are used, by their running counts: see :func:`usage_of`."""
        return usage_of(self.counts)

    def extra_repr(self) -> str:
        return f"{self.num_codes} codes of {self.codebook.shape[1]}, {self.similarity}, decay={self.decay}"

    def _checked(self, h: Tensor) -> Tensor:
        if h.ndim != 2 or h.shape[1] != self.codebook.shape[1]:
            raise InputError(f"the codes have {self.codebook.shape[1]} numbers; rows to quantise have {tuple(h.shape)}")
        return full_precision(h)


def usage_of(counts: Tensor) -> dict[str, float]:
    r"""``codes_used``: how many of the counts (M,) are above 0; ``code_perplexity``: :math:`\exp(-\sum_m p_m \ln p_m)`, from 1 (collapse) to M."""
    share = counts.double() / counts.sum().double().clamp_min(1e-12)
    entropy = float(torch.special.entr(share).sum())
    return {"codes_used": float((counts > 0).sum()), "code_perplexity": math.exp(entropy)}
