"""The student alone: what every distillation method has to beat."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field

from limbeck.core.batch import Batch, Losses
from limbeck.methods.models.base import ModelDistiller


class Supervised(ModelDistiller):
    """Cross-entropy on the labels, no teacher. Labels may be soft.

    .. math:: L = \\mathrm{CE}(z_s, y)
    """

    name = "supervised"

    class Config(ModelDistiller.Config):
        label_smoothing: float = Field(0.0, ge=0, lt=1, description="mass that is spread evenly over all classes")

    def losses(self, batch: Batch) -> Losses:
        logits = self.student_logits(batch)
        return Losses(ce=F.cross_entropy(logits, self.labels(batch), label_smoothing=self.config.label_smoothing))
