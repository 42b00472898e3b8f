"""Distribution matching: class means of the last representation in networks with random weights."""

from __future__ import annotations

import torch
from pydantic import Field

from limbeck.core.batch import Batch, Losses
from limbeck.losses.matching import mean_matching
from limbeck.methods.datasets.matching_base import FeatureMatching


class DM(FeatureMatching):
    r"""Distribution matching: synthetic images whose mean features are those of real images.

    Every step draws a network :math:`\phi` with new random weights. With :math:`R_c` a batch of real images of class c,
    :math:`S_c` all of its synthetic images, :math:`a_c` one draw of the augmentation for both, and e the last representation,

    .. math:: L = \sum_c \lVert \mathrm{mean}\, e_\phi(a_c(R_c)) - \mathrm{mean}\, e_\phi(a_c(S_c)) \rVert_2^2 .

    Gradients go to the synthetic images alone; networks are never trained.

    Without the engine::

        method = DM((x, y), lambda: ConvNet(...), ipc=10)
        optimizer = torch.optim.SGD([method.images], lr=1.0, momentum=0.5)
        for batch in loader:  # real images with labels, some of every class
            loss = method(batch)
            ...
        method.distilled()

    Source: "Dataset Condensation with Distribution Matching" (2023); multi-formation (``factor``) is from "Dataset Condensation via
    Efficient Synthetic-Data Parameterization" (2022).
    """

    name = "dm"

    class Config(FeatureMatching.Config):
        lr_images: float = Field(1.0, gt=0, description="learning rate of the images (SGD)")

        presets = {
            "paper": {
                "steps": 20_000,
                "batch_real": 256,
                "judge_networks": ("convnet-w128-d3",),
                "judge_seeds": 5,
                "judge_lr": 0.01,
                "judge_steps": 1000,
                "judge_batch_size": 256,
            }
        }

    def losses(self, batch: Batch) -> Losses:
        real, real_labels, synthetic, labels = self.views(batch)
        network = self.fresh_network()
        head = self.head(network)
        with torch.no_grad():
            wanted = self.tapped(network, [head], real)[head]
        found = self.tapped(network, [head], synthetic)[head]
        loss = mean_matching(wanted, real_labels, found, labels, self.num_classes)
        return Losses(features=loss).observe(**self.range_of_pixels())
