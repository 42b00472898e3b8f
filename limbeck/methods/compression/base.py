"""The contract of the ``compression`` family: a network comes out with fewer or coarser numbers, in the bytes that it says."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import nn

from limbeck.blocks.storage import Storage, chosen_layers
from limbeck.core.data import Data
from limbeck.methods.models.base import OfflineDistiller
from limbeck.networks.artifacts import save_model
from limbeck.tasks.judging import judge_classifiers


class Compressor(OfflineDistiller):
    """Base of the methods that compress a student's weights while a teacher shows it what to say.

    A method trains ``student`` in place as the families of models do, and says what came out: :meth:`compressed` is the plain network whose weights
    have the values that are stored, :meth:`storage` counts what they take, :meth:`save_compact` writes them in that form.

    Args:
        student: the network to compress, trained in place.
        teacher: see :class:`~limbeck.methods.models.base.OfflineDistiller`; often the student before compression.
        config: hyper-parameters; or give single ones as keyword arguments.
    """

    family = "compression"

    class Config(OfflineDistiller.Config):
        """Optimisation, and which layers are compressed."""

        layers: tuple[str, ...] = Field(
            (), description="regular expressions of layer names to compress; none: all linear and convolutional layers"
        )
        keep: tuple[str, ...] = Field((), description="regular expressions of layer names to leave as they are")

    compressible: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def chosen(self) -> dict[str, nn.Module]:
        """The student's layers that are compressed, by name.

        Raises:
            InputError: a pattern finds nothing, or only layers that cannot be compressed.
        """
        return chosen_layers(
            self.student, lambda m: isinstance(m, self.compressible), self.config.layers, self.config.keep
        )

    @abstractmethod
    def compressed(self) -> nn.Module:
        """A plain copy of the student with the values that are stored, in evaluation mode."""

    @abstractmethod
    def storage(self) -> Storage:
        """What :meth:`compressed` takes on disk."""

    @abstractmethod
    def save_compact(self, folder: Path) -> None:
        """Write the compressed form into the artifact's folder."""

    # ---- judging and keeping the result ------------------------------------------------------------------------------

    def contestants(self) -> dict[str, nn.Module]:
        return {**super().contestants(), "student": self.compressed()}

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """As all classifiers, and what the compressed network takes."""
        return self.with_storage(judge_classifiers(self.contestants(), test, class_names))

    def with_storage(self, result: dict[str, Any]) -> dict[str, Any]:
        """A result whose first row also says what is stored, and all other rows their float size."""
        storage = self.storage()
        first, *others = result["rows"]
        first.update(stored_bytes=storage.bytes, compression=storage.ratio(), bits_per_weight=storage.bits_per_number)
        for row in others:
            row.update(stored_bytes=row["bytes"], compression=1.0)
        return {**result, "storage": storage.by_form()}

    def save_artifact(self, folder: Path, description: dict[str, Any]) -> None:
        """The plain network with the stored values, and beside it the compressed form."""
        save_model(self.compressed(), folder, description)
        self.save_compact(folder)
