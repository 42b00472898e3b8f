"""Random selection: what every choice of samples must beat."""

from __future__ import annotations

import torch

from limbeck.blocks import coresets
from limbeck.core.batch import Batch
from limbeck.core.data import Data, mix_seed
from limbeck.core.distilled import DistilledDataset
from limbeck.core.stage import Stage, Stepper
from limbeck.methods.datasets.selection_base import Selection


class RandomSelection(Selection):
    """Real samples drawn uniformly from each class, without replacement.

    Without the engine::

        small = RandomSelection((x, y), ipc=10).select()

    The baseline of every paper on coresets and on dataset distillation.
    """

    name = "random-selection"

    def choose(self, label: int, count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, label, 73))
        ids = self.classes.ids(label)
        alone = torch.zeros(len(ids), dtype=torch.long)
        return ids[coresets.random_selection(alone, torch.tensor([count]), generator)]

    def stages(self, train: Data | None = None, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """One stage of one step."""
        return [Stage("selection", 1, update=self.update)]

    def update(self, batch: Batch | None, stepper: Stepper) -> dict[str, torch.Tensor]:
        self.select()
        return {"chosen": torch.tensor(len(self.chosen))}

    def contestants(self) -> dict[str, DistilledDataset]:
        found = super().contestants()
        found.pop("random, same bytes")  # it would be the same thing twice
        return found
