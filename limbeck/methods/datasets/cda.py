"""Curriculum data synthesis: recovering images from their global structure to their details."""

from __future__ import annotations

from pydantic import Field

from limbeck.blocks.views import CropCurriculum, Curriculum
from limbeck.methods.datasets.recover_base import RecoverDistiller


class CDA(RecoverDistiller):
    r"""Curriculum data augmentation: squeeze, recover and relabel with crops that begin as whole images and get smaller.

    Only the lower bound of the crops' area share changes. At iteration it of I, with :math:`m` = ``milestone`` · I and the
    lowest bound a (0.08, or 0.35 for images below 32 pixels; ``lowest_crop``):

    .. math:: a_{it} = a + (1 - a)\,\frac{1 + \cos(\pi\,it/m)}{2} \quad (it < m), \qquad a_{it} = a \quad (it \ge m)

    for the ``cosine`` curriculum; see :class:`~limbeck.blocks.views.CropCurriculum` for the others. ``none`` is SRe2L. So an
    image first takes on the structure that its class and the feature statistics ask of the whole, and then the details.

    Source: "Dataset Distillation via Curriculum Data Synthesis in Large Data Era" (2024). The values of ``paper`` are those for
    ImageNet-1K, of ``tiny`` those for Tiny-ImageNet (where the shift is our choice).
    """

    name = "cda"

    class Config(RecoverDistiller.Config):
        curriculum: Curriculum = Field(
            "cosine",
            description="course of the smallest crop: step, linear, cosine (large to small), reversed, none (SRe2L) or whole",
        )
        milestone: float = Field(1.0, gt=0, le=1, description="share of the iterations after which crops have any size")

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
                "student_batch_size": 128,
                "student_lr": 1e-3,
            },
            "tiny": {
                "ipc": 50,
                "iterations": 4000,
                "lr": 0.4,
                "r_bn": 0.05,
                "jitter": 4,
                "labels": "stored",
                "temperature": 20.0,
                "student_crop": 0.08,
                "student_epochs": 300,
                "student_batch_size": 128,
                "student_lr": 1e-3,
            },
        }

    def make_curriculum(self) -> CropCurriculum:
        return CropCurriculum(self.config.curriculum, self.lowest_crop, self.config.milestone)
