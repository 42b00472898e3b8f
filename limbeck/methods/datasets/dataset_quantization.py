"""Dataset quantisation: a data set cut into submodular bins once, and sampled from all of them at any ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.blocks.embeddings import instruction_text, text_embeddings
from limbeck.blocks.similarity_kernels import Kernel, similarity_kernel
from limbeck.blocks.submodular_bins import Bins, Take, bin_sizes, cut_bin, dq_bins, dq_sample
from limbeck.core.batch import Batch
from limbeck.core.data import Data, mix_seed
from limbeck.core.distilled import DistilledDataset
from limbeck.core.errors import InputError
from limbeck.core.stage import Stage, Stepper
from limbeck.methods.datasets.patches_base import PatchDropping
from limbeck.methods.datasets.selection_base import UNFINISHED

BINS = 10


class DatasetQuantization(PatchDropping):
    r"""Dataset quantisation (DQ).

    Step 1, once: each class D is cut into N bins that do not overlap. Bin k is chosen greedily from what the earlier ones left,
    :math:`D_k = D \setminus (S_1 \cup \dots \cup S_{k-1})`, by the gain of the graph cut,

    .. math:: G(v | S) = \lambda \sum_{u \in D_k} K(u, v) - 2 \sum_{s \in S} K(s, v), \qquad K(a, b) = \tfrac12 + \tfrac12 \cos(a, b),

    representativeness of what is left against diversity inside the bin; early bins are central, late ones outlying. Step 2, at any
    ratio, as often as wanted: the same part of every bin, at random. A single graph cut of that size would be ruled by its first term,
    and lose diversity. Step 3, where asked for (``drop``): the patches of each image in which Grad-CAM finds least evidence are
    dropped, and filled in again by a masked autoencoder when the data set is used.

    Without the engine::

        method = DatasetQuantization((x, y), encoder=trained, ipc=10)
        method.quantise()
        method.sample(ratio=0.02), method.sample(ratio=0.1, seed=7)

    Texts and other things that are no tensors: :func:`quantise_texts`, or :func:`limbeck.blocks.submodular_bins.dq_bins` on embeddings.

    Args:
        data, network, encoder, config, embeddings, seed, class_names: see
            :class:`limbeck.methods.datasets.selection_base.EmbeddingSelection`.
        reconstructor: fills dropped patches, see :class:`limbeck.methods.datasets.patches_base.PatchDropping`.

    Raises:
        InputError: see these two.

    Source: "Dataset Quantization" (2023). The number of bins at small sizes, the sizes of bins that do not divide a class, and the part of
    patches dropped (the paper's text and code differ) are our decisions.
    """

    name = "dataset-quantization"

    class Config(PatchDropping.Config):
        bins: int | None = Field(
            None, ge=1, description=f"N; none: {BINS}, or as many as samples are kept of a class, if those are fewer"
        )
        function: Literal["graph-cut", "facility-location", "log-det"] = Field(
            "graph-cut", description="what a bin maximises"
        )
        representativeness: float = Field(1.0, ge=0, description="λ of the graph cut")
        optimiser: Literal["naive", "lazy", "stochastic"] = Field(
            "naive", description="greedy algorithm; lazy makes the same choice and pays for facility-location"
        )
        kernel: Literal["cosine", "inner"] = Field(
            "cosine", description="cosine: 0.5 + 0.5 cos; inner: cos, as the paper takes for texts"
        )
        balanced: bool = Field(True, description="cut each class by itself; otherwise labels are not looked at")
        take: Take = Field("uniform", description="the same part of every bin, or whole early or late bins (worse)")

        presets = {
            "paper": {
                "bins": 10,
                "ratio": 0.125,
                "embedding": "gradients",
                "double_softmax": True,
                "judge_steps": 20_000,
                "judge_batch_size": 128,
                "judge_lr": 0.1,
            }
        }

    bin: Tensor
    rank: Tensor
    gain: Tensor

    def __init__(
        self,
        data: Any,
        network: Any = None,
        encoder: nn.Module | None = None,
        config: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(data, network, encoder, config, **options)
        n = len(self.real)
        self.groups = self.classes.labels if self.config.balanced else torch.zeros(n, dtype=torch.long)
        self.n_bins = self.config.bins or max(1, min(BINS, int(self.counts.max())))
        self.register_buffer("bin", torch.full((n,), UNFINISHED))
        self.register_buffer("rank", torch.full((n,), UNFINISHED))
        self.register_buffer("gain", torch.zeros(n, dtype=torch.float64))
        self.plan = [
            (group, number, size)
            for group, members in enumerate(torch.bincount(self.groups).tolist())
            for number, size in enumerate(bin_sizes(members, self.n_bins))
        ]
        self._kernel: tuple[int, Kernel] | None = None

    # ---- bins --------------------------------------------------------------------------------------------------------

    def stages(self, train: Data | None = None, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """``bins``, a step for each bin of each class; and ``autoencoder``, where one must be trained."""
        return [Stage("bins", len(self.plan), update=self.update), *self.autoencoder_stages(seed)]

    def update(self, batch: Batch | None, stepper: Stepper) -> dict[str, Tensor]:
        gains = self.cut(stepper.step)
        return {"gain": gains.mean(), "binned": (self.bin != UNFINISHED).sum()}

    def cut(self, step: int) -> Tensor:
        """Make the bin of a step, and draw the subset after the last one; the gains (size,) of its samples."""
        c = self.config
        group, number, size = self.plan[step]
        ids = (self.groups == group).nonzero().flatten()
        left = (self.bin[ids.to(self.bin.device)] == UNFINISHED).nonzero().flatten().cpu()
        chosen = cut_bin(
            self._kernel_of(group, ids),
            left,
            size,
            function=c.function,
            settings={"representativeness": c.representativeness} if c.function == "graph-cut" else None,
            optimiser=c.optimiser,
            generator=torch.Generator().manual_seed(mix_seed(self.seed, step, 83)),
        )
        done = len(ids) - len(left)
        where = ids[chosen.order].to(self.bin.device)
        self.bin[where] = number
        self.rank[where] = torch.arange(done, done + size, device=where.device)
        self.gain[where] = chosen.gains.to(where.device)
        if step == len(self.plan) - 1:
            self._kernel = None
            how_many = {"count": len(self.chosen)} if c.ratio is not None or not c.balanced else {"ipc": c.ipc}
            self.chosen = self._drawn(self.seed, c.take, **how_many).to(where.device)
        return chosen.gains

    def quantise(self) -> Bins:
        """Make all bins without the engine."""
        for step in range(len(self.plan)):
            self.cut(step)
        return self.bins()

    def select(self) -> DistilledDataset:
        """Make all bins without the engine, and draw from them.

        Raises:
            InputError: an autoencoder must be trained first, which takes the engine.
        """
        self.quantise()
        return self.distilled()

    def bins(self) -> Bins:
        """The bins; without labels if classes are not balanced.

        Raises:
            InputError: they were not made yet.
        """
        if bool((self.bin == UNFINISHED).any()):
            raise InputError(f"{self.name} has made no bins yet: run its stages (limbeck.fit), or quantise()")
        count = max(number for _, number, _ in self.plan) + 1
        labels = self.classes.labels if self.config.balanced else None
        return Bins(self.bin.cpu(), self.rank.cpu(), self.gain.cpu(), labels, count)

    def sample(
        self,
        ratio: float | None = None,
        seed: int = 0,
        *,
        ipc: int | None = None,
        count: int | None = None,
        take: Take = "uniform",
    ) -> DistilledDataset:
        """A subset from the bins that are there; see :func:`limbeck.blocks.submodular_bins.dq_sample`.

        Raises:
            InputError: no bins yet, or a size out of range.
        """
        given = {"ratio": ratio, "ipc": ipc, "count": count}
        return self.dataset_of(self._drawn(seed, take, **{k: v for k, v in given.items() if v is not None}))

    def _drawn(self, seed: int, take: Take, **how_many: Any) -> Tensor:
        """Ids of a subset, sorted by class."""
        ids = dq_sample(self.bins(), seed=mix_seed(seed, 89), take=take, **how_many)
        return ids[self.classes.labels[ids].argsort(stable=True)]

    def profile(self) -> dict[str, list[float]]:
        """By bin: the mean gain, and the mean similarity to the whole class (centrality)."""
        bins = self.bins()
        central = torch.zeros(len(bins), dtype=torch.float64)
        for group in range(int(self.groups.max()) + 1):
            ids = (self.groups == group).nonzero().flatten()
            central[ids] = (self._kernel_of(group, ids).sums() / len(ids)).cpu()
        self._kernel = None
        return {"gain": bins.profile().tolist(), "centrality": bins.profile(central).tolist()}

    def _kernel_of(self, group: int, ids: Tensor) -> Kernel:
        if self._kernel is None or self._kernel[0] != group:
            rows = self.embeddings()[ids].to(self.bin.device)
            self._kernel = (group, similarity_kernel(rows, self.config.kernel))
        return self._kernel[1]

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """Besides the family's judgement: the profile of the bins."""
        return {**super().evaluate(test, class_names), "bins": self.profile()}


def quantise_texts(
    records: Sequence[Mapping[str, Any] | str],
    n_bins: int = 5,
    *,
    embeddings: Tensor | None = None,
    labels: Tensor | None = None,
    dimensions: int = 128,
    seed: int = 0,
    **options: Any,
) -> Bins:
    """Bins of texts or instruction records (``instruction``, ``input``, ``output``), from which ``dq_sample`` draws.

    ::

        records = read_instructions("alpaca_data.json")
        bins = quantise_texts(records, 5)
        small = [records[i] for i in dq_sample(bins, count=1000)]

    Args:
        records: strings or records.
        n_bins: the paper takes 5 or 10.
        embeddings: (N, e) of a sentence encoder of your own; None: TF-IDF reduced by SVD.
        labels: (N,) classes to balance; None: texts have none.
        dimensions: of the reduced TF-IDF.
        seed: of the SVD.
        options: further ones of :func:`limbeck.blocks.submodular_bins.dq_bins`; the kernel is the inner product of unit vectors.

    Raises:
        InputError: records without text, or embeddings that are not as many.
    """
    rows = (
        text_embeddings([instruction_text(r) for r in records], dimensions, seed=seed)
        if embeddings is None
        else embeddings
    )
    if len(rows) != len(records):
        raise InputError(f"{len(records)} records but {len(rows)} embeddings: they must be as many")
    return dq_bins(rows, n_bins, labels, **{"kernel": "inner", **options})
