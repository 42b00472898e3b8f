"""Flat trajectory distillation: experts that go through flat regions, and an average of the images."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from limbeck.core.data import Data, mix_seed
from limbeck.core.stage import Stage
from limbeck.methods.datasets.trajectory_base import TrajectoryMatching
from limbeck.tasks.base import stratified_order
from limbeck.tasks.judging_datasets import everything, train_networks

MOST_CHECKED = 2000  # validation samples by which images or their average are chosen


class FTD(TrajectoryMatching):
    r"""Flat trajectory distillation: small errors at the start of a segment should stay small.

    Training on the synthetic images starts each segment from its own last point, not from the expert's. With the error
    :math:`e_k = \hat\theta_k - \theta^*_k` and :math:`\Theta_S` the T steps on synthetic images,

    .. math:: e_{k+1} = e_k + \big[\Theta_S(\theta^*_k + e_k) - \Theta_S(\theta^*_k)\big] + \delta_{k+1} .

    Matching trajectories (see :class:`~limbeck.methods.datasets.mtt.MTT`) makes :math:`\delta` small; the bracket is small if the
    expert's path is flat. So experts minimise

    .. math:: L(\theta) + \alpha\,\Big[\max_{\lVert e\rVert \le \rho} L(\theta + e) - L(\theta)\Big]

    by the adaptive surrogate-gap method (:func:`limbeck.blocks.sharpness.gsam_gradient`), with a constant rate and without momentum.
    Matching itself is that of MTT, plus an exponential moving average of the images, :math:`\bar S \leftarrow d\bar S + (1-d)S`.
    In the end fresh networks are trained on S and on :math:`\bar S`, and the one that is better on validation data is kept; without
    validation data, on real training samples (our decision: the published script looks at test data).

    Attributes:
        average: the moving average of the images.
        use_average: whether it is the result.

    Source: "Minimizing the Accumulated Trajectory Error to Improve Dataset Distillation" (2023). The values of ``paper`` are those for
    CIFAR-10 with 10 images per class. ``rho`` is relative to the parameters' sizes, and small networks need a larger one than the
    published 0.01, which changes nothing there.
    """

    name = "ftd"

    class Config(TrajectoryMatching.Config):
        rho: float = Field(0.5, ge=0, description="radius of the flat regions that experts look for; 0: plain SGD")
        ema: float = Field(0.99, ge=0, lt=1, description="decay d of the moving average of the images; 0: none")
        check_networks: int = Field(
            3, ge=1, description="networks trained on the images and on their average to choose between them"
        )

        presets = {
            "paper": {
                "ipc": 10,
                "steps": 5000,
                "lr_images": 100.0,
                "lr_step": 1e-5,
                "step_size": 0.001,
                "inner_steps": 30,
                "segment": 2,
                "max_start": 20,
                "ema": 0.9995,
                "expert_count": 100,
                "expert_epochs": 50,
                "expert_batch_size": 256,
                "expert_lr": 0.01,
                "rho": 0.01,
                "alpha": 0.3,
                "zca": True,
                "diffaug": "color_crop_cutout_flip_scale_rotate",
                "bits": 16,
                "judge_networks": ("convnet-w128-d3",),
                "judge_seeds": 5,
                "judge_steps": 1000,
                "judge_batch_size": 256,
            }
        }

    average: Tensor
    use_average: Tensor

    def __init__(self, data: Any, network: Any, config: Any = None, **options: Any) -> None:
        super().__init__(data, network, config, **options)
        self.register_buffer("average", self.images.detach().clone())
        self.register_buffer("use_average", torch.tensor(False))

    @torch.no_grad()
    def follow_images(self) -> None:
        """One step of the average towards the images; call it after every update."""
        self.average.lerp_(self.images, 1 - self.config.ema)

    def choose(self, val: Data | None = None) -> dict[str, float]:
        """Keep the images or their average, whichever trains better networks; ties go to the images.

        Args:
            val: real data that was not distilled; None: real training samples.

        Returns:
            the mean accuracies ``images`` and ``average``.
        """
        if self.config.ema == 0:
            self.use_average.fill_(False)
            return {}
        inputs, labels = self._check_samples(val)
        assert self.factory is not None
        found = {}
        for name, images in (("images", self.images), ("average", self.average)):
            made = self.as_product(images.detach(), self.labels)
            trained = train_networks(
                made,
                self.factory,
                self.config.recipe(made.recipe),
                seeds=self.config.check_networks,
                seed=mix_seed(self.seed, 73),
                augment=self.judge_augmentation(),
                device=self.device,
            )
            found[name] = fmean(trained.accuracies(inputs, labels))
        self.use_average.fill_(found["average"] > found["images"])
        return found

    def _check_samples(self, val: Data | None) -> tuple[Tensor, Tensor]:
        """Samples in the space of the images."""
        if val is not None:
            inputs, labels = self.prepared_test(val)
        else:
            inputs, labels = everything(self.real)  # whitened already, where that is asked for
        chosen = stratified_order(labels, self.seed)[:MOST_CHECKED]
        return inputs[chosen], labels[chosen]

    def stages(self, train: Data | None = None, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        def begin() -> None:
            self.average.copy_(self.images.detach())

        def end() -> None:
            self.choose(val)

        (stage,) = super().stages(train, val, seed=seed)
        stage.begin, stage.end = begin, end
        stage.after_step = lambda step: self.follow_images()
        return [stage]

    def product(self) -> tuple[Tensor, Tensor]:
        return (self.average if self.use_average else self.images).detach(), self.labels

    def evaluate(self, test: Data, class_names: Any = None) -> dict[str, Any]:
        return {**super().evaluate(test, class_names), "average_chosen": bool(self.use_average)}
