"""The contract of the ``fields`` family: a scene comes out, judged by its renders from where nothing was trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import nn

from limbeck.core.artifacts import DESCRIPTION
from limbeck.core.batch import Batch
from limbeck.core.data import Data
from limbeck.core.errors import InputError
from limbeck.core.files import read_json, write_json
from limbeck.core.method import Method
from limbeck.core.optim import OptimiserConfig
from limbeck.core.stage import Stage
from limbeck.rendering.cameras import Cameras
from limbeck.rendering.renderers import Renderer
from limbeck.rendering.turntable import write_gif
from limbeck.tasks.judging_fields import judge_views, orbit_frames, view_pictures
from limbeck.tasks.scenes import PosedImages, SceneSetup


class FieldDistiller(Method):
    """Base of the methods whose product is a scene.

    A method says what it trains and how (:meth:`stages`), and how its result and its rivals are drawn (:meth:`renderers`).

    Attributes:
        on: the task that results are judged on, if there is one.
    """

    family = "fields"

    class Config(OptimiserConfig):
        """What the whole family has."""

        steps: int = Field(500, ge=1, description="updates of the result")
        optimizer: Literal["adamw", "adam", "sgd"] = Field("adam", description="update rule")
        weight_decay: float = Field(0.0, ge=0, description="weight decay (decoupled for adamw)")
        betas: tuple[float, float] = Field((0.9, 0.99), description="decay of adam's and adamw's two running means")
        adam_eps: float = Field(1e-8, gt=0, description="added to the denominator of adam's and adamw's steps")
        turntable_frames: int = Field(36, ge=0, description="frames of the turntable that is kept; 0: none")

    class Setup(SceneSetup):
        """What a run by name builds."""

    def __init__(self, config: Any = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        self.on: Any = None

    # ---- what a method defines -------------------------------------------------------------------------------------------

    def stages(self, train: Data | None = None, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """The loops of a run."""
        raise NotImplementedError(f"{type(self).__name__} defines no stages")

    @property
    def result(self) -> nn.Module:
        """What is kept: a field, Gaussians or anchors, with ``save(folder)``."""
        raise NotImplementedError(f"{type(self).__name__} defines no result")

    def renderers(self) -> dict[str, Renderer]:
        """The result first, then what it is compared with."""
        raise NotImplementedError(f"{type(self).__name__} defines no renderers")

    @classmethod
    def build(cls, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> tuple[Self, Any]:
        """The method on a task, and the task."""
        raise NotImplementedError(f"{cls.__name__} cannot be run by name")

    @classmethod
    def from_data(cls, data: Data, student: Any, teacher: Any, config: Any, *, seed: int = 0) -> Self:
        """The method on a user's own views (:class:`~limbeck.tasks.scenes.PosedImages`) and modules."""
        raise InputError(f"{cls.name} is made as an object: {cls.__name__}(…), then limbeck.fit(object, views)")

    # ---- running ---------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        found = next(self.parameters(), None)
        return torch.device("cpu") if found is None else found.device

    def prepare_run(self, train: Data, val: Data | None, setup: Any = None) -> None:
        """Nothing is needed before a run."""

    def check(self, batch: Batch) -> None:
        """Draw one view of every renderer.

        Raises:
            InputError: it fails or is not finite.
        """
        views = self.on.train if self.on is not None else None
        cameras = self.seen_from(views)
        if cameras is None:
            return
        small = cameras[0].resized(8, 8)
        for name, renderer in self.renderers().items():
            with torch.no_grad():
                image = renderer(small.to(self.device))["rgb"]
            if not bool(torch.isfinite(image).all()):
                raise InputError(f"the {name} draws values that are not finite: check its weights")

    def seen_from(self, views: Any) -> Cameras | None:
        """Cameras that show the result: those of the task, unless a method knows better."""
        return views.cameras if isinstance(views, PosedImages) else None

    # ---- judging and keeping the result -----------------------------------------------------------------------------------

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """All renderers on held-out views: PSNR, SSIM, cost; and pictures.

        Raises:
            InputError: the test data is no :class:`~limbeck.tasks.scenes.PosedImages`.
        """
        if not isinstance(test, PosedImages):
            raise InputError(f"{self.name} is judged on posed pictures: give test=PosedImages(cameras, images)")
        renderers = self.renderers()
        return {"rows": judge_views(renderers, test), "pictures": view_pictures(renderers, test)}

    def save_artifact(self, folder: Path, description: dict[str, Any]) -> None:
        """The result in its own format, and a turntable that any browser plays."""
        folder.mkdir(parents=True, exist_ok=True)
        save: Any = self.result.save
        save(folder)
        write_json(folder / DESCRIPTION, {**description, **read_json(folder / DESCRIPTION)})
        if self.config.turntable_frames:
            renderer = next(iter(self.renderers().values()))
            cameras = self.seen_from(None if self.on is None else self.on.test)
            write_gif(orbit_frames(renderer, cameras, self.config.turntable_frames), folder / "turntable.gif")
