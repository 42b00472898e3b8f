"""SRe2L, the baseline of decoupled dataset distillation."""

from __future__ import annotations

from pydantic import Field

from limbeck.blocks.views import CropCurriculum
from limbeck.methods.datasets.recover_base import RecoverDistiller


class SRe2L(RecoverDistiller):
    """Squeeze, recover and relabel: images are inverted from one trained classifier, and labelled by it.

    The crops that the classifier is shown while images are recovered have the same range of sizes throughout (or are whole
    images, as published for small ones). Everything else is in the base class.

    Source: "Squeeze, Recover and Relabel: Dataset Condensation at ImageNet Scale From A New Perspective" (2023). The values of
    ``paper`` are those for ImageNet-1K, of ``cifar`` those for CIFAR-100; r_bn is given there as 0.01 to 1, the middle of which is
    our choice.
    """

    name = "sre2l"

    class Config(RecoverDistiller.Config):
        crops: bool = Field(True, description="recover from crops of any size; off: from whole images")

        presets = {
            "paper": {
                "ipc": 50,
                "iterations": 4000,
                "lr": 0.25,
                "r_bn": 0.01,
                "jitter": 32,
                "labels": "stored",
                "temperature": 20.0,
                "student_crop": 0.08,
                "student_epochs": 300,
                "student_batch_size": 1024,
                "student_lr": 1e-3,
            },
            "cifar": {
                "ipc": 50,
                "iterations": 1000,
                "lr": 0.25,
                "r_bn": 0.1,
                "jitter": 4,
                "crops": False,
                "labels": "online",
                "mix": "mixup",
                "temperature": 30.0,
                "student_crop": 0.08,
                "student_epochs": 400,
                "student_batch_size": 128,
                "student_lr": 1e-3,
            },
        }

    def make_curriculum(self) -> CropCurriculum:
        return CropCurriculum("none" if self.config.crops else "whole", self.lowest_crop)
