r"""Retrieval against hubs without training: scores or embeddings corrected by what banks of reference queries and gallery items say.

With :math:`S_{qg}` the cosine of a query and an item and :math:`Z_\beta(g; B) = \log\sum_{b\in B} e^{\beta b\cdot g}`, over a bank of queries B_q or of items
B_g, :class:`BankNorms` offers

- ``plain``: S.
- ``inverted_softmax``: :math:`\beta S - Z_\beta(g; B_q)`, the logarithm of :math:`e^{\beta S_{qg}} / \sum_{q'} e^{\beta S_{q'g}}`: an item that many reference
  queries like counts less. With ``hub_k`` (QB-Norm, dynamic) only for queries whose first item is a hub: is among the first ``hub_k`` of a
  reference query.
- ``dual_norm`` (DB-Norm): the product of both normalisations, :math:`(\beta_q + \beta_g) S - Z_{\beta_q}(g; B_q) - Z_{\beta_g}(g; B_g)`.
- ``centred``: cosines after the banks' means are taken off.
- ``whitened``: cosines after means are taken off and the pooled principal axes are scaled to one variance.

Banks are read in blocks. Nothing depends on other test queries.

Sources: "Offline bilingual word vectors, orthogonal transformations and the inverted softmax" (2017); "Cross Modal Retrieval with Querybank
Normalisation" (2022); "Balance Act: Mitigating Hubness in Cross-Modal Retrieval with Query and Gallery Banks" (2023).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.blocks.inverse_convolution import checked_strength, mean_row
from limbeck.blocks.nearest_rows import BLOCK, Block, Rows, checked_rows, top_k, unit_block, unit_blocks
from limbeck.core.errors import InputError

Side = Literal["gallery", "query"]


@dataclass(frozen=True, eq=False)
class Index:
    """A gallery that queries can be scored against.

    Attributes:
        gallery: (N, E) unit rows.
        shift: (D,) taken off unit queries; None: nothing.
        axes: (D, E), what shifted queries are multiplied by; None: nothing.
        scale, offset: scores are scale * cosine - offset (N,).
        hubs: (N,) bool: only queries whose nearest item is one are corrected by scale and offset. None: all.
    """

    gallery: Tensor
    shift: Tensor | None = None
    axes: Tensor | None = None
    scale: float = 1.0
    offset: Tensor | None = None
    hubs: Tensor | None = None

    def scores(self, queries: Rows) -> Tensor:
        """(Q, N), larger is closer. Only the order within a row means something."""
        unit = unit_block(queries, 0, len(queries), self.gallery.device).to(self.gallery.dtype)
        cosine = _mapped(unit, self.shift, self.axes) @ self.gallery.T
        if self.offset is None:
            return cosine
        corrected = self.scale * cosine - self.offset
        if self.hubs is None:
            return corrected
        return torch.where(self.hubs[cosine.argmax(1)][:, None], corrected, cosine)


class BankNorms:
    """The ways of correcting one gallery by two banks; what they need to know of the banks is computed once.

    Args:
        gallery: (N, D), arrays or tensors, of any length. gallery_bank, query_bank: (M, D) and (M', D).
        block: rows and bank rows at a time.

    Raises:
        InputError: shapes that do not fit, NaN or infinity.
    """

    def __init__(self, gallery: Rows, gallery_bank: Rows, query_bank: Rows, *, block: Block = BLOCK) -> None:
        checked_rows(gallery, "the gallery's embeddings")
        self.banks = {"gallery": gallery_bank, "query": query_bank}
        for side, bank in self.banks.items():
            checked_rows(bank, f"the {side} bank's embeddings", gallery.shape[1])
        self.unit, self.block = unit_block(gallery, 0, len(gallery)), block
        self.mean = functools.cache(self._mean)
        self.partition = functools.cache(self._partition)
        self.hubs = functools.cache(self._hubs)
        self.principal = functools.cache(self._principal)

    def plain(self) -> Index:
        """Cosines as they are."""
        return Index(self.unit)

    def inverted_softmax(self, beta: float = 20.0, hub_k: int | None = None) -> Index:
        """Inverted softmax, or with ``hub_k`` QB-Norm in its dynamic form.

        Args:
            beta: inverse temperature, above 0; 5 to 50 are usual.
            hub_k: an item is a hub if it is among the first so many of any reference query (1 in the paper). None: every query is
                corrected.
        """
        hubs = None if hub_k is None else self.hubs(hub_k)
        return Index(self.unit, scale=beta, offset=self.partition("query", beta), hubs=hubs)

    def dual_norm(self, beta_query: float = 1 / 1.99, beta_gallery: float = 3.0) -> Index:
        """DB-Norm; the defaults are those of its published code."""
        offset = self.partition("query", beta_query) + self.partition("gallery", beta_gallery)
        return Index(self.unit, scale=beta_query + beta_gallery, offset=offset)

    def centred(self, strength_gallery: float = 1.0, strength_query: float | None = 1.0) -> Index:
        """The banks' means, times a strength, taken off unit rows: of the gallery, and of the queries unless theirs is None."""
        checked_strength("strength_gallery", strength_gallery)
        moved = _mapped(self.unit, strength_gallery * self.mean("gallery"), None)
        if strength_query is None:
            return Index(moved)
        checked_strength("strength_query", strength_query)
        return Index(moved, shift=strength_query * self.mean("query"))

    def whitened(self, power: float = 1.0, components: int | None = None) -> Index:
        r"""Both sides lose their bank's mean and are mapped by :math:`V\Lambda^{-p/2}`, of the covariance of both centred banks together.

        One map for both sides keeps pairs comparable.

        Args:
            power: p, from 0 (centring and projection only) to 1 (one variance along every axis).
            components: principal axes that are kept; None: all.
        """
        checked_strength("power", power)
        variances, vectors = self.principal()
        kept = len(variances) if components is None else components
        if not 1 <= kept <= len(variances):
            raise InputError(f"components must be between 1 and the {len(variances)} dimensions (got {components})")
        floor = 1e-8 * float(variances[0]) + torch.finfo(self.unit.dtype).tiny
        axes = (vectors[:, :kept] * variances[:kept].clamp_min(floor) ** (-power / 2)).to(self.unit)
        return Index(_mapped(self.unit, self.mean("gallery"), axes), shift=self.mean("query"), axes=axes)

    # ---- what is computed once ---------------------------------------------------------------------------------------

    def _mean(self, side: Side) -> Tensor:
        return mean_row(self.banks[side], self.block).to(self.unit)

    def _partition(self, side: Side, beta: float) -> Tensor:
        return log_partition(self.unit, self.banks[side], beta, self.block)

    def _hubs(self, k: int) -> Tensor:
        _, places = top_k(self.banks["query"], self.unit, min(k, len(self.unit)), block=self.block)
        return torch.zeros(len(self.unit), dtype=torch.bool, device=self.unit.device).index_fill(
            0, places.unique(), True
        )

    def _principal(self) -> tuple[Tensor, Tensor]:
        """Variances and axes of both centred banks together, the largest first."""
        total = sum(len(bank) for bank in self.banks.values())
        width = self.unit.shape[1]
        covariance = torch.zeros(width, width, dtype=torch.float64, device=self.unit.device)
        for bank in self.banks.values():
            mean = mean_row(bank, self.block).to(covariance)
            for _, rows in unit_blocks(bank, self.block[1], covariance.device):
                centred = rows.double() - mean
                covariance += centred.T @ centred / total
        variances, vectors = torch.linalg.eigh(covariance)
        return variances.flip(0), vectors.flip(1)


@torch.no_grad()
def log_partition(gallery: Rows, bank: Rows, beta: float, block: Block = BLOCK) -> Tensor:
    """Z (N,): the logarithm of the sum over the bank of exp(beta * cosine with each gallery item).

    Raises:
        InputError: a ``beta`` that is not positive, shapes that do not fit.
    """
    checked_rows(gallery, "the gallery's embeddings")
    checked_rows(bank, "the bank's embeddings", gallery.shape[1])
    checked_strength("beta", beta)
    if beta == 0:
        raise InputError("beta must be above 0")
    found = []
    for _, unit in unit_blocks(gallery, block[0]):
        parts = [
            (beta * (unit @ rows.T.to(unit.dtype))).logsumexp(1) for _, rows in unit_blocks(bank, block[1], unit.device)
        ]
        found.append(torch.stack(parts).logsumexp(0))
    return torch.cat(found)


def _mapped(unit: Tensor, shift: Tensor | None, axes: Tensor | None) -> Tensor:
    if shift is None and axes is None:
        return unit
    moved = unit if shift is None else unit - shift
    return F.normalize(moved if axes is None else moved @ axes, dim=1)
