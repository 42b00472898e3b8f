"""What methods share that match features of real and synthetic images in networks with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.blocks.class_batches import ClassStream
from limbeck.blocks.taps import Features, Tap, Taps
from limbeck.core.batch import Batch, call_model
from limbeck.core.data import Data, mix_seed
from limbeck.core.errors import InputError
from limbeck.core.stage import Stage
from limbeck.methods.datasets.base import ImageDistiller


class FeatureMatching(ImageDistiller):
    """Base: every step draws a network with new weights, and compares what it makes of real and of synthetic images.

    Real and synthetic images of a class get the same augmentation (siamese), one draw for each class and step. All classes go
    through the network at once. With ``accumulate`` above 1 they go in groups, each through a network of its own.
    """

    class Config(ImageDistiller.Config):
        batch_real: int = Field(64, ge=1, description="real images of each class per step")
        feature: str | None = Field(
            None, description="path of the layer whose input is the last representation; none: the last linear layer"
        )
        accumulate: int = Field(1, ge=1, description="groups of classes that go through a network one after the other")

    def views(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Augmented real images and their labels, augmented synthetic images of the same classes and theirs."""
        if batch.labels is None:
            raise InputError("the batch has no labels: give (inputs, labels)")
        draw = self.augment.draw(self.num_classes)
        images, labels = self.present()
        present = torch.zeros(self.num_classes, dtype=torch.bool, device=labels.device)
        present[batch.labels] = True
        if not bool(present.all()):
            chosen = present[labels]
            images, labels = images[chosen], labels[chosen]
        real = self.augment.apply(batch.inputs, draw[batch.labels.cpu()])
        return real, batch.labels, self.augment.apply(images, draw[labels.cpu()]), labels

    def head(self, network: nn.Module) -> Tap:
        """The tap that gives the last representation of a network."""
        if self.config.feature is not None:
            return Tap(self.config.feature, io="input")
        linear = [path for path, part in network.named_modules() if isinstance(part, nn.Linear)]
        if not linear:
            raise InputError(f"{type(network).__name__} has no linear layer: say whose input to match, with feature=…")
        return Tap(linear[-1], io="input")

    @staticmethod
    def tapped(network: nn.Module, taps: Sequence[Tap], images: Tensor) -> Features:
        """What the taps give on one forward pass."""
        with Taps(network, taps, clone=True) as features:
            call_model(network, images)
        return features

    def range_of_pixels(self) -> dict[str, Tensor]:
        """For the log: synthetic pixels may leave the range of real ones."""
        return {"lowest": self.images.detach().min(), "highest": self.images.detach().max()}

    def stages(self, train: Data | None = None, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """One stage; real images come from the data that the method was made with."""
        stream = ClassStream(self.real, self.classes, self.config.batch_real, seed=mix_seed(seed, 5))
        settings: dict[str, Any] = {"losses": self.losses, "accumulate": self.config.accumulate}
        steps = self.config.steps
        return [Stage("matching", steps, stream, optimisers=lambda: self.optimisers(steps), **settings)]
