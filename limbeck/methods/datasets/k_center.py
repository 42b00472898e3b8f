"""Greedy k-centre: samples such that none is far from a chosen one."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from limbeck.blocks import coresets
from limbeck.core.data import mix_seed
from limbeck.methods.datasets.selection_base import EmbeddingSelection


class KCenter(EmbeddingSelection):
    r"""Greedy k-centre ("core-set"), class by class.

    In each class, with features :math:`\phi` and the chosen S, the next sample is

    .. math:: \arg\max_x \min_{s \in S} \lVert \phi(x) - \phi(s) \rVert_2 ,

    so that the largest distance from a sample to the nearest chosen one is at most twice the smallest there can be.

    Without the engine::

        small = KCenter((x, y), encoder=trained, ipc=10).select()

    Source: "Active Learning for Convolutional Neural Networks: A Core-Set Approach" (2018), its greedy algorithm. The paper starts from
    samples that are labelled already; the start is a setting here.
    """

    name = "k-center"

    class Config(EmbeddingSelection.Config):
        first: Literal["medoid", "random"] = Field(
            "medoid", description="where each class starts: the sample nearest to the mean, or a random one"
        )

    def choose(self, label: int, count: int) -> Tensor:
        ids = self.classes.ids(label)
        first: int | Literal["medoid"] = "medoid"
        if self.config.first == "random":
            generator = torch.Generator().manual_seed(mix_seed(self.seed, label, 79))
            first = int(torch.randint(len(ids), (), generator=generator))
        return ids[coresets.k_center(self.embeddings()[ids], count, first=first)]
