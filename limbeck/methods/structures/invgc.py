"""InvGC: gallery embeddings are spread out by taking off what they share with their neighbours in two reference banks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, ValidationInfo, field_validator
from safetensors.torch import save_file
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from limbeck.blocks.bank_norms import Index
from limbeck.blocks.inverse_convolution import (
    Bank,
    DenseBank,
    checked_strength,
    inverse_convolution,
    make_bank,
    mean_row,
    pushed,
)
from limbeck.blocks.nearest_rows import BLOCK, Block, Rows, checked_rows, unit_blocks
from limbeck.blocks.stored_banks import load_banks, save_banks
from limbeck.core.artifacts import DESCRIPTION, register_kind
from limbeck.core.errors import InputError
from limbeck.core.files import atomic_path, write_json
from limbeck.methods.structures.base import StructureMethod
from limbeck.metrics.degeneration import degeneration_score
from limbeck.tasks.embeddings import EmbeddingPairs, EmbeddingSetup, load_embeddings
from limbeck.tasks.judging_embeddings import (
    RIVALS,
    best_of,
    cosine_picture,
    judged,
    norms_of,
    shape_of,
    strength_grid,
    strength_picture,
    tuned,
    warn_if_hopeless,
)

STRENGTHS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
NEIGHBOURS = (None, 0.01, 0.05, 0.1)
KIND = "embedding-transform"


class InvGC(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    r"""Inverse graph convolution of a gallery, dense or with local adjacency; nothing is trained.

    With unit rows, a bank B of M rows and :math:`S = G B^\top`, a branch is

    .. math:: U_B(G) = \mathrm{norm}\big(G - \tfrac{r}{M} (S - s_0) B\big) \quad\text{or}\quad \mathrm{norm}\big(G - \tfrac{r}{k}\,\mathrm{top}_k(S)\, B\big),

    where top_k keeps the k largest entries of each row, and the result has a branch for each modality:

    .. math:: G' = \mathrm{norm}\big(\tfrac12 U_{B_g}(G; r_g) + \tfrac12 U_{B_q}(G; r_q)\big).

    Queries stay as they are: similarities are :math:`Q G'^\top`. The dense form is linear, and keeps a D x D matrix of each bank; the local one
    keeps the bank (a reference to it, no copy) and searches it in blocks. An item's result depends on the item and the banks only.

    Our decision: s0 is a constant of the banks, :math:`\bar b_g \cdot \bar b`, an estimate of the mean of S before the gallery is seen, so that new
    items can come one by one; ``centre="gallery"`` takes the mean of S of the gallery at hand, as the published code does. Without a query
    bank its branch is as with r_q = 0.

    Args:
        r_gallery, r_query: strengths r_g and r_q, 0 and above. They scale with how similar items are: choose them (:meth:`select`).
        k: None: dense; an integer: so many neighbours in each bank; a share in (0, 1] of each bank, at least one neighbour.
        centre: s0 of the dense form: ``bank``, ``gallery`` or ``none`` (0).
        skip_copies: bank rows that equal an item (cosine above 1 - 1e-5) are no neighbours of it: set it where the gallery is its own bank.
        block: rows of the gallery and of the bank that are compared at a time.

    Attributes:
        n_features_in_: D.
        gallery_bank_, query_bank_: prepared banks; the latter may be None.
        centres_: s0 of both.
        degeneration_: mean cosine of two rows of the gallery bank; 0 for a bank of one.
        selection_: after :meth:`select`, all settings that were tried, the best first.

    Raises:
        InputError: settings out of range, embeddings that are no matrix of finite numbers or of another width.

    Example:
        >>> invgc = InvGC.select(bank_g, bank_q, val_gallery, val_queries)
        >>> scores = queries @ invgc.transform(gallery).T

    Source: "InvGC: Robust Cross-Modal Retrieval by Inverse Graph Convolution" (2023).
    """

    def __init__(
        self,
        r_gallery: float = 1.0,
        r_query: float = 1.0,
        k: float | None = None,
        *,
        centre: Literal["bank", "gallery", "none"] = "bank",
        skip_copies: bool = False,
        block: Block = BLOCK,
    ) -> None:
        self.r_gallery = r_gallery
        self.r_query = r_query
        self.k = k
        self.centre = centre
        self.skip_copies = skip_copies
        self.block = block

    def fit(self, X: Any, y: Any = None, *, query_bank: Any = None) -> Self:
        """Prepare the banks.

        Args:
            X: (M, D), the gallery's bank: reference embeddings of the gallery's modality; arrays or tensors, of any length.
            y: ignored.
            query_bank: (M', D), of the queries' modality. Never test queries.
        """
        checked_strength("r_gallery", self.r_gallery)
        checked_strength("r_query", self.r_query)
        if self.centre not in ("bank", "gallery", "none"):
            raise InputError(f"centre must be bank, gallery or none (got {self.centre!r})")
        X = self._rows(X, reset=True)
        self.gallery_bank_: Bank = self._bank(X)
        self.query_bank_: Bank | None = None if query_bank is None else self._bank(self._rows(query_bank))
        own = mean_row(X, self.block)
        self.centres_ = tuple(
            float(own @ b.mean.to(own)) if self.centre == "bank" and isinstance(b, DenseBank) else 0.0
            for b in (self.gallery_bank_, self.query_bank_)
        )
        self.degeneration_ = degeneration_score(X, self.block) if len(X) > 1 else 0.0
        return self

    def transform(self, X: Any, out: Any = None) -> Any:
        """The gallery (N, D), spread out: rows of length 1, of the kind of ``X`` (array or tensor), or written into ``out``."""
        check_is_fitted(self)
        return inverse_convolution(
            self._rows(X),
            self.gallery_bank_,
            self.query_bank_,
            r_gallery=self.r_gallery,
            r_query=self.r_query,
            centre=None if self.centre == "gallery" else self.centres_,
            block=self.block,
            out=out,
        )

    @classmethod
    def select(
        cls,
        gallery_bank: Any,
        query_bank: Any,
        gallery: Any,
        queries: Any,
        *,
        gallery_ids: Any = None,
        query_ids: Any = None,
        strengths: Sequence[float] = STRENGTHS,
        neighbours: Sequence[float | None] = NEIGHBOURS,
        **settings: Any,
    ) -> Self:
        """Fitted with the strengths and ``k`` that are best on validation pairs: by R@1 + R@5 + R@10, the earlier of equal ones.

        Warns where embeddings are spread out already, or where nothing that was tried beats the untouched gallery.

        Args:
            gallery, queries: (N, D) and (Q, D), validation embeddings; query i looks for item i, or for the items with its id.
            strengths: values of r_gallery and of r_query.
            neighbours: values of ``k``.
            settings: others of the estimator.
        """
        pairs = EmbeddingPairs(queries, gallery, query_ids, gallery_ids)
        found: list[dict[str, Any]] = []
        for k in neighbours:
            found += cls(k=k, **settings).fit(gallery_bank, query_bank=query_bank).tried(pairs, strengths, strengths)
        made = cls(**best_of(found), **settings).fit(gallery_bank, query_bank=query_bank)
        made.selection_ = sorted(found, key=lambda row: -row["objective"])
        warn_if_hopeless(shape_of(pairs), untouched=made.r_gallery == made.r_query == 0)
        return made

    @torch.no_grad()
    def tried(
        self,
        pairs: EmbeddingPairs,
        strengths_gallery: Sequence[float] = STRENGTHS,
        strengths_query: Sequence[float] = STRENGTHS,
    ) -> list[dict[str, Any]]:
        """What all pairs of strengths are worth on validation pairs, with this ``k``; neighbours are looked up once.

        Returns:
            for each pair ``r_gallery``, ``r_query``, ``k``, ``objective`` and what :func:`limbeck.metrics.ranks.rank_measures` gives.
        """
        check_is_fitted(self)
        unit = torch.cat([rows for _, rows in unit_blocks(self._rows(pairs.gallery), self.block[0])])
        branches: list[dict[float, Tensor]] = []
        for bank, s0, values in zip(
            (self.gallery_bank_, self.query_bank_), self.centres_, (strengths_gallery, strengths_query), strict=True
        ):
            if bank is None:
                branches.append(dict.fromkeys(values, unit))
                continue
            if self.centre == "gallery" and isinstance(bank, DenseBank):
                s0 = float(unit.mean(0) @ bank.mean.to(unit))
            pull = torch.cat([bank.pull(rows, s0) for rows in unit.split(self.block[0])])
            branches.append({r: pushed(unit, pull, r) for r in values})
        return [{**row, "k": self.k} for row in strength_grid(branches[0], branches[1], pairs, self.block[0])]

    # ---- storing -----------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write ``transform.safetensors`` (the banks, as far as they are needed) and ``transform.json`` (everything else).

        Raises:
            RunError: they cannot be written.
        """
        check_is_fitted(self)
        about = {
            "parameters": self.get_params(),
            "n_features_in_": self.n_features_in_,
            "centres_": list(self.centres_),
            "degeneration_": self.degeneration_,
        }
        save_banks(Path(folder), {"gallery": self.gallery_bank_, "query": self.query_bank_}, about)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """What :meth:`save` wrote; a RunError where nothing is there, or it is damaged."""
        banks, about = load_banks(Path(folder))
        parameters = about.pop("parameters")
        made = cls(**{**parameters, "block": tuple(parameters["block"])})
        for name, value in about.items():
            setattr(made, name, tuple(value) if isinstance(value, list) else value)
        made.gallery_bank_, made.query_bank_ = banks["gallery"], banks.get("query")
        return made

    def _bank(self, rows: Rows) -> Bank:
        return make_bank(rows, self.k, skip_copies=self.skip_copies, block=self.block)

    def _rows(self, rows: Any, reset: bool = False) -> Rows:
        """A tensor, checked; of anything else an array, checked by scikit-learn."""
        if not isinstance(rows, Tensor):
            return np.asarray(validate_data(self, rows, reset=reset, dtype=(np.float64, np.float32, np.float16)))
        checked_rows(rows, width=None if reset else self.n_features_in_)
        if reset:
            self.n_features_in_: int = rows.shape[1]
        return rows.detach()


# ---- by name -------------------------------------------------------------------------------------------------------------


class InvGCMethod(StructureMethod):
    r"""Chooses :class:`InvGC` on validation pairs of a task of embeddings, and keeps the test gallery that it makes.

    One step for each number of neighbours: all pairs of strengths are tried with it. The best of all by R@1 + R@5 + R@10 transforms the
    test gallery, which is judged once, beside the untouched one and rivals that were tuned on the same validation pairs: centring,
    whitening, inverted softmax, QB-Norm and DB-Norm. The banks are the training pairs.

    Attributes:
        found: what was tried so far.
        estimator: the chosen :class:`InvGC`, when the run has ended.

    Source: "InvGC: Robust Cross-Modal Retrieval by Inverse Graph Convolution" (2023).
    """

    name = "invgc"

    class Config(StructureMethod.Config):
        strengths_gallery: tuple[float, ...] = Field(STRENGTHS, description="values of r_gallery to choose from")
        strengths_query: tuple[float, ...] = Field(STRENGTHS, description="values of r_query to choose from")
        neighbour_shares: tuple[float, ...] = Field(
            (0.0, 0.01, 0.05, 0.1),
            description="shares of the bank that are neighbours, to choose from; 0: the dense form",
        )
        centre: Literal["bank", "gallery", "none"] = Field(
            "bank",
            description="of the dense form's similarities: the banks' mean, the gallery's, or not at all",
        )
        skip_copies: bool = Field(False, description="bank rows that equal an item are no neighbours of it")
        block_rows: tuple[int, int] = Field(BLOCK, description="rows of gallery and bank at a time")
        rival_candidates: int = Field(
            49, ge=0, description="settings that each rival may choose from on validation pairs; 0: no rivals"
        )

        @field_validator("strengths_gallery", "strengths_query", "neighbour_shares", "block_rows")
        @classmethod
        def _in_range(cls, value: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
            low, high = {"neighbour_shares": (0, 1), "block_rows": (1, math.inf)}.get(
                info.field_name or "", (0, math.inf)
            )
            if not value or not all(low <= v <= high and math.isfinite(v) for v in value):
                raise ValueError(f"give numbers from {low}" + f" to {high}" * (high == 1))
            return value

        presets = {"paper": {"neighbour_shares": (0.0, 0.01), "centre": "gallery"}}

    class Setup(EmbeddingSetup):
        """Which embeddings."""

    def __init__(self, config: Any = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        self.found = _Found()

    @classmethod
    def build(cls, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> tuple[Self, Any]:
        made = cls(config)
        made.on = load_embeddings(setup)
        return made, made.on

    def steps(self) -> int:
        return len(self.config.neighbour_shares)

    def state(self) -> Mapping[str, Any]:
        return {"found": self.found}

    def work(self, step: int) -> Mapping[str, float]:
        """Try all strengths with one number of neighbours."""
        fitted = self._estimator(k=self.config.neighbour_shares[step] or None)
        rows = fitted.tried(self.on.val, self.config.strengths_gallery, self.config.strengths_query)
        self.found.rows = [*self.found.rows, *rows]
        best = max(rows, key=lambda row: row["objective"])
        return {name: best[name] for name in ("recall_at_1", "recall_at_10", "median_rank")}

    def chosen(self) -> InvGC:
        """The best of what was tried, fitted.

        Raises:
            InputError: nothing was tried yet.
        """
        if not self.found.rows:
            raise InputError("nothing was tried yet: run the method first")
        if self.estimator is None:
            self.estimator = self._estimator(**best_of(self.found.rows))
        return self.estimator

    def _estimator(self, **parameters: Any) -> InvGC:
        config, bank = self.config, self.on.train
        made = InvGC(centre=config.centre, skip_copies=config.skip_copies, block=config.block_rows, **parameters)
        return made.fit(bank.gallery, query_bank=bank.query)

    def evaluate(self, test: Any, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """Ranks and the gallery's shape, before and after; the chosen settings; whether help was to be expected."""
        chosen, on = self.chosen(), self.on
        after = Index(chosen.transform(test.gallery))
        shape = shape_of(on.val)
        warn_if_hopeless(shape, untouched=chosen.r_gallery == chosen.r_query == 0)
        rows = [judged("invgc", after, test, before=test.gallery)]
        norms = norms_of(on.train, test.gallery)
        for name, rival in RIVALS.items():
            if name == "raw" or self.config.rival_candidates:
                settings = tuned(rival, on.train, on.val, self.config.rival_candidates)
                rows.append(judged(rival.label, rival.index(norms, **settings), test))
        return {
            "rows": rows,
            "r_gallery": chosen.r_gallery,
            "r_query": chosen.r_query,
            "neighbours": "all (dense)" if chosen.k is None else f"{chosen.k:g} of the bank",
            "help_expected": "yes" if shape.help_expected else "no",
            "target_similarity": shape.target_similarity,
            "pictures": self._pictures(test, after.gallery),
        }

    def _pictures(self, test: EmbeddingPairs, after: Tensor) -> list[dict[str, str]]:
        """Validation recall against the strength, where both are equal, and the cosines in the test gallery."""
        untouched = judged("untouched", norms_of(self.on.train, self.on.val.gallery).plain(), self.on.val)
        curves = strength_picture(self.found.rows, untouched["recall_at_1"])
        return [*curves, cosine_picture({"before": test.gallery, "after": after})]

    def save_artifact(self, folder: Path, description: dict[str, Any]) -> None:
        """The transformed test gallery (``gallery.safetensors``), the transform for further items, and its parameters as JSON."""
        chosen = self.chosen()
        gallery = chosen.transform(self.on.test.gallery)
        with atomic_path(folder / "gallery.safetensors") as path:
            save_file({"gallery": gallery.contiguous(), "gallery_ids": self.on.test.gallery_ids.contiguous()}, path)
        chosen.save(folder)
        about = {"kind": KIND, "parameters": chosen.get_params(), "gallery": list(gallery.shape), **description}
        write_json(folder / DESCRIPTION, about)


class _Found:
    """What was tried, for checkpoints."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rows = list(state["rows"])


def read_transform(folder: Path, description: Mapping[str, Any]) -> InvGC:
    """The :class:`InvGC` of an artifact."""
    return InvGC.load(folder)


register_kind(KIND, read_transform)
