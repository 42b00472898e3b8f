"""Herding: samples whose mean follows the mean of their class."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from limbeck.blocks import coresets
from limbeck.blocks.similarity_kernels import unit_rows
from limbeck.methods.datasets.selection_base import EmbeddingSelection


class Herding(EmbeddingSelection):
    r"""Herding in feature space, class by class.

    With :math:`\mu` the mean of the features :math:`\phi` of a class and :math:`w_0 = \mu`,

    .. math:: x_t = \arg\max_x \langle w_{t-1}, \phi(x) \rangle, \qquad w_t = w_{t-1} + \mu - \phi(x_t) ,

    each sample at most once. On features of unit length (the default) this is the choice that brings the mean of the chosen samples
    nearest to :math:`\mu`; on others, ``rule="mean"`` takes that choice, as papers on dataset distillation do.

    Without the engine::

        small = Herding((x, y), encoder=trained, ipc=10).select()

    Sources: "Herding Dynamical Weights to Learn" (2009); "iCaRL: Incremental Classifier and Representation Learning" (2017) for the
    rule by the mean.
    """

    name = "herding"

    class Config(EmbeddingSelection.Config):
        normalise: bool = Field(True, description="scale features to unit length first")
        rule: Literal["mean", "welling"] = Field(
            "mean", description="mean: bring the mean nearest; welling: largest inner product. The same on unit length"
        )

    def choose(self, label: int, count: int) -> Tensor:
        ids = self.classes.ids(label)
        features = self.embeddings()[ids]
        features = unit_rows(features) if self.config.normalise else features
        return ids[coresets.herding(features, count, self.config.rule)]
