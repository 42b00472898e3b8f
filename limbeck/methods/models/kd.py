"""Hinton's knowledge distillation, the baseline of the family."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field

from limbeck.core.batch import Batch, Losses
from limbeck.losses.logits import forward_kl
from limbeck.methods.models.base import OfflineDistiller


class KD(OfflineDistiller):
    r"""Knowledge distillation: the student matches the teacher's softened probabilities and the labels.

    With teacher logits :math:`z_t` and student logits :math:`z_s`, both (B, C), and temperature :math:`\tau`:

    .. math:: L = (1-\alpha)\,\mathrm{CE}(z_s, y)
              + \alpha\,\tau^2\,\mathrm{KL}\big(\mathrm{softmax}(z_t/\tau)\,\|\,\mathrm{softmax}(z_s/\tau)\big)

    The divergence is summed over classes and averaged over the batch; :math:`\tau^2` keeps the gradient's scale when
    :math:`\tau` changes. Several teachers are joined by averaging their softened probabilities. Labels may be soft.

    Source: "Distilling the Knowledge in a Neural Network" (2015). The paper gives no single recipe; ``paper`` holds the
    settings under which the method is usually compared on CIFAR.
    """

    name = "kd"

    class Config(OfflineDistiller.Config):
        temperature: float = Field(4.0, gt=0, description="softens both distributions")
        alpha: float = Field(
            0.9, ge=0, le=1, description="weight of the teacher; 1 - alpha is the weight of the labels"
        )

        presets = {
            "paper": {
                "epochs": 240,
                "optimizer": "sgd",
                "lr": 0.05,
                "weight_decay": 5e-4,
                "schedule": "step",
                "milestones": (0.625, 0.75, 0.875),
            }
        }

    def losses(self, batch: Batch) -> Losses:
        config = self.config
        student = self.student_logits(batch)
        teacher = self.teach(batch)
        if len(self.teachers) == 1:
            kl = forward_kl(student, teacher.logits, config.temperature)
        else:
            soft = teacher.probabilities(config.temperature).clamp_min(1e-12)
            kl = F.kl_div(F.log_softmax(student / config.temperature, -1), soft, reduction="batchmean")
        weighted = (config.alpha * config.temperature**2, kl)
        if config.alpha == 1:
            return Losses(kd=weighted)
        return Losses(ce=(1 - config.alpha, F.cross_entropy(student, self.labels(batch))), kd=weighted)
