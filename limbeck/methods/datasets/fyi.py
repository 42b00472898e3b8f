"""FYI: any matching method, with the mirror images of its synthetic images beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator
from torch import Tensor

from limbeck import catalogue
from limbeck.blocks.formation import flip_union
from limbeck.core.batch import Batch, Losses
from limbeck.core.config import Config, validate
from limbeck.core.data import Data
from limbeck.core.distilled import DistilledDataset
from limbeck.core.errors import InputError
from limbeck.core.method import Method
from limbeck.core.stage import Stage
from limbeck.methods.datasets.base import ImageDistiller
from limbeck.tasks.base import Task, load_task


class FYI(Method):
    r"""Flip your images: a plug-in for methods that match synthetic images with real ones.

    Wherever the host's loss reads its synthetic images :math:`(S, y)`, it sees

    .. math:: A(S, y) = ([S, \mathrm{flip}(S)], [y, y])

    with the flip along the width, before any augmentation. Gradients of both halves add up in S; ipc images are stored, and networks
    are judged on them as with the host alone. Where classes look the same in a mirror, an image need not show a part on both sides
    any more, and has room for other details. Not for digits, text or traffic signs: there it hurts.

    With DM and DataDAM the class mean goes over both halves; in trajectory matching every student step sees both, and the learned
    step size refers to the doubled batch.

    Args:
        host: the method to plug into, whatever it was made with; it is changed in place.
        config: a record of the host's name and settings, for runs by name; None: the host's own.

    Without the engine::

        method = FYI(DataDAM((x, y), network, ipc=1))
        loss = method(batch)  # the host's loss, on images and mirror images

    Source: "FYI: Flip Your Images for Dataset Distillation" (2024). It has no parameter of its own.
    """

    name = "fyi"
    family = "datasets"

    class Config(Config):
        """The host and its settings."""

        host: str = Field("dm", description="the method to plug into: dm, datadam, mtt, ftd, datm …")
        ipc: int = Field(10, ge=1, description="samples per class to distil into (images per class)")
        settings: tuple[str, ...] = Field(
            (), description="further settings of the host, as name=value (see limbeck run HOST --help)"
        )
        host_preset: str = Field("small", description="preset of the host")

        presets = {"paper": {"host_preset": "paper"}}

        @model_validator(mode="after")
        def _pairs(self) -> Self:
            for setting in self.settings:
                if "=" not in setting:
                    raise ValueError(f"settings are pairs name=value (got '{setting}')")
            return self

    class Setup(ImageDistiller.Setup):
        """What a run by name builds."""

    host: ImageDistiller

    def __init__(self, host: ImageDistiller, config: Config | None = None, **overrides: Any) -> None:
        if not isinstance(host, ImageDistiller):
            raise InputError(
                f"fyi plugs into methods that learn images (dm, datadam, mtt …), not into {type(host).__name__}"
            )
        if config is None and not overrides:
            overrides = {"host": host.name, "ipc": host.config.ipc}
        super().__init__(config, **overrides)
        self.host = host
        host.formation = flip_union

    # ---- the host does the rest --------------------------------------------------------------------------------------

    def losses(self, batch: Batch) -> Losses:
        return self.host.losses(batch)

    def stages(self, train: Data, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        return self.host.stages(train, val, seed=seed)

    def prepare_run(self, train: Data, val: Data | None, setup: Any = None) -> None:
        self.host.show_progress = self.show_progress
        self.host.prepare_run(train, val, setup)

    def check(self, batch: Batch) -> None:
        self.host.check(batch)

    def distilled(self) -> DistilledDataset:
        """The host's images; their mirror images are not stored."""
        return self.host.distilled()

    def evaluate(self, test: Data, class_names: Any = None) -> dict[str, Any]:
        self.host.show_progress = self.show_progress
        found = self.host.evaluate(test, class_names)
        return {**found, "left_right_similarity": float(left_right_similarity(self.host.images.detach()).mean())}

    def save_artifact(self, folder: Path, description: dict[str, Any]) -> None:
        self.host.save_artifact(folder, description)

    # ---- building by name --------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> tuple[Self, Task]:
        task = load_task(setup)
        return cls.on_task(task, setup, config, seed=seed, progress=progress), task

    @classmethod
    def on_task(cls, task: Task, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> Self:
        kind, own = host_of(config)
        return cls(kind.on_task(task, setup, own, seed=seed, progress=progress), config)

    @classmethod
    def from_data(cls, data: Data, student: Any, teacher: Any, config: Any, *, seed: int = 0) -> Self:
        kind, own = host_of(config)
        return cls(kind.from_data(data, student, teacher, own, seed=seed), config)


def host_of(config: FYI.Config) -> tuple[Any, Any]:
    """The host's class and its configuration.

    Raises:
        InputError: the named method does not learn images, or a setting is wrong.
    """
    kind: Any = catalogue.get(config.host).load()
    if not (isinstance(kind, type) and issubclass(kind, ImageDistiller)):
        raise InputError(f"fyi plugs into methods that learn images (dm, datadam, mtt …), not into '{config.host}'")
    pairs: Mapping[str, str] = dict(setting.split("=", 1) for setting in config.settings)
    values = {**kind.Config.preset_values(config.host_preset), "ipc": config.ipc, **pairs}
    return kind, validate(kind.Config, values)


def left_right_similarity(images: Tensor) -> Tensor:
    """(N,) cosine similarity of each image (C, H, W) and its mirror image, their mean removed: what FYI should lower."""
    flat = (images - images.mean((1, 2, 3), keepdim=True)).flatten(1)
    mirrored = (images.flip(-1) - images.mean((1, 2, 3), keepdim=True)).flatten(1)
    return (flat * mirrored).sum(1) / flat.square().sum(1).clamp_min(1e-12)
