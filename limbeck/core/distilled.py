"""A distilled data set: a few samples, their labels, and how to train on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.core.errors import InputError

Kind = Literal["images", "latents", "vectors"]


def label_bytes(num_classes: int) -> int:
    """Bytes that a class index takes."""
    return 1 if num_classes <= 256 else 2 if num_classes <= 65_536 else 4


@dataclass
class DistilledDataset:
    """Samples that stand for a large data set.

    Attributes:
        inputs: (N, ...) float32, as networks take them: normalised images (N, C, H, W), latents, or vectors.
        labels: (N,) int64 class indices, or (N, C) float32 probabilities.
        num_classes: C.
        kind: what the inputs are.
        bits: of a stored value: 8 (one scale per channel), 16 or 32 (floating point).
        mean, std: per channel, of the normalisation that was applied to real images with values in [0, 1]; empty: none was.
        index: (N,) which real samples these are, for a selection.
        factor: each image is a grid of ``factor`` x ``factor`` smaller ones, see :class:`limbeck.blocks.formation.MultiFormation`.
        recipe: how to train on it, where it has a say: ``lr``, ``temperature``, ….
        class_names: one for each class.
        extra_bytes: what else must be stored with it: a whitening transform, label stores.

    Raises:
        InputError: no samples, lengths that differ, or labels that are neither of the two kinds.
    """

    inputs: Tensor
    labels: Tensor
    num_classes: int
    kind: Kind = "images"
    bits: Literal[8, 16, 32] = 8
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    index: Tensor | None = None
    factor: int = 1
    recipe: Mapping[str, Any] = field(default_factory=dict)
    class_names: Sequence[str] = ()
    extra_bytes: int = 0

    def __post_init__(self) -> None:
        if not len(self.inputs) or len(self.inputs) != len(self.labels):
            raise InputError(
                f"a distilled data set needs as many labels as samples (got {len(self.inputs)} and {len(self.labels)})"
            )
        hard = self.labels.ndim == 1 and not self.labels.is_floating_point()
        if not hard and not (self.labels.ndim == 2 and self.labels.shape[1] == self.num_classes):
            raise InputError(
                f"labels of shape {tuple(self.labels.shape)} are neither class indices (N,) nor probabilities (N, {self.num_classes})"
            )

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def soft(self) -> bool:
        """True if labels are probabilities."""
        return self.labels.ndim == 2

    @property
    def hard_labels(self) -> Tensor:
        """(N,) class indices; of soft labels the most probable class."""
        return self.labels.argmax(1) if self.soft else self.labels

    # ---- what it costs to keep ---------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of samples, labels (probabilities take two bytes each) and whatever else must be kept; before compression."""
        samples = self.inputs.numel() * self.bits // 8
        if self.bits == 8:
            samples += 8 * self.inputs.shape[1]  # two floats of scale per channel
        labels = 2 * self.labels.numel() if self.soft else label_bytes(self.num_classes) * len(self)
        return samples + labels + self.extra_bytes

    def share_of(self, real_samples: int) -> float:
        """Its bytes as a share of so many real samples of this size."""
        return self.nbytes / (real_samples * real_bytes(self.inputs.shape[1:], self.num_classes, self.kind))

    # ---- what storing does to it -------------------------------------------------------------------------------------

    def scale(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest value of each channel (C,) that 8-bit storage must reach.

        Where the normalisation is known it reaches at least from black to white, so that real pixels are stored exactly.
        """
        flat = self.inputs.transpose(0, 1).flatten(1)
        low, high = flat.min(1).values, flat.max(1).values
        if len(self.mean):
            mean, std = torch.tensor(self.mean).to(low), torch.tensor(self.std).to(low)
            low, high = torch.minimum(low, (0 - mean) / std), torch.maximum(high, (1 - mean) / std)
        return low, torch.where(high > low, high, low + 1)

    def codes(self) -> Tensor:
        """(N, ...) uint8 values on the scale of :meth:`scale`."""
        low, high = (self._per_channel(v) for v in self.scale())
        return ((self.inputs - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8)

    def decode(self, codes: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Values (N, ...) of stored codes."""
        low, high = self._per_channel(low), self._per_channel(high)
        return low + codes.to(low) / 255 * (high - low)

    def stored(self) -> DistilledDataset:
        """What comes back from the disk: values in ``bits`` bits, probabilities in 16. Judge this, not the original."""
        if self.bits == 8:
            inputs = self.decode(self.codes(), *self.scale())
        else:
            inputs = self.inputs.half().float() if self.bits == 16 else self.inputs
        labels = self.labels.half().float() if self.soft else self.labels
        return replace(self, inputs=inputs, labels=labels)

    def pixels(self) -> Tensor:
        """(N, C, H, W) uint8 pictures of the images: normalisation undone where it is known, out-of-range values clipped."""
        if not len(self.mean):
            return self.codes()
        mean, std = (self._per_channel(torch.tensor(v).to(self.inputs)) for v in (self.mean, self.std))
        return ((self.inputs * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)

    def _per_channel(self, value: Tensor) -> Tensor:
        return value.view(1, -1, *(1,) * (self.inputs.ndim - 2))


def real_bytes(shape: Sequence[int], num_classes: int, kind: Kind = "images") -> int:
    """Bytes of one real sample of this shape: a byte per value of an image, four per value of anything else, and a class index."""
    return int(torch.Size(shape).numel()) * (1 if kind == "images" else 4) + label_bytes(num_classes)
