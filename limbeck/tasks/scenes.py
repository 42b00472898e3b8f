"""Tasks of scenes: posed pictures in three parts, of an analytic scene whose truth is known or of photographs."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.config import Config
from limbeck.core.data import Data, mix_seed
from limbeck.core.errors import InputError
from limbeck.rendering.cameras import Cameras, look_at, normalised
from limbeck.rendering.captures import read_capture
from limbeck.rendering.scenes import SCENES, AnalyticScene, scene, shots
from limbeck.rendering.volume import render_image
from limbeck.tasks.base import hash_of

TRUE_SAMPLES = 160
"""Samples on each ray of a true picture."""


class PosedImages(Data):
    """Pictures and where they were taken from.

    A batch's inputs are ``{"image": (B, H, W, 3) in [0, 1], "number": (B,)}``, numbers into ``cameras``.

    Args:
        cameras: N of them.
        images: (N, H, W, 3) in [0, 1], sRGB; None: cameras alone, for what needs no pictures.

    Raises:
        InputError: another number or size of pictures than cameras say, values that are no colours.
    """

    def __init__(self, cameras: Cameras, images: Tensor | None = None) -> None:
        if images is not None:
            wanted = (len(cameras), cameras.height, cameras.width, 3)
            if tuple(images.shape) != wanted:
                raise InputError(f"pictures for these cameras are {wanted}, not {tuple(images.shape)}")
            if not images.is_floating_point():
                raise InputError(f"pictures hold numbers in [0, 1], not {images.dtype}: divide by 255")
            if not bool(torch.isfinite(images).all()) or float(images.amin()) < -1e-4 or float(images.amax()) > 1.0001:
                raise InputError("pictures hold finite numbers in [0, 1]: rescale or clamp them")
        self.cameras = cameras
        self._images = images

    @property
    def images(self) -> Tensor:
        """(N, H, W, 3).

        Raises:
            InputError: there are none.
        """
        if self._images is None:
            raise InputError("these cameras have no pictures: give PosedImages(cameras, images)")
        return self._images

    @property
    def has_images(self) -> bool:
        return self._images is not None

    def __len__(self) -> int:
        return len(self.cameras)

    def fetch(self, index: Tensor, view: int | None) -> Batch:
        inputs = {"number": index}
        if self._images is not None:
            inputs["image"] = self._images[index]
        return Batch(inputs, index=index, view=view)

    def fingerprint(self) -> str:
        lens = self.cameras.distortion
        parts = [self.cameras.c2w, self.cameras.fx, self.cameras.fy, self.cameras.cx, self.cameras.cy]
        return hash_of(*parts, *([] if lens is None else [lens]), *([] if self._images is None else [self._images]))

    def subset(self, index: Tensor) -> PosedImages:
        """Some of them."""
        return PosedImages(self.cameras[index], None if self._images is None else self._images[index])


class SceneSetup(Config):
    """Which scene, and how much is seen of it."""

    task: str = Field(
        "spheres_box",
        description=f"an analytic scene ({', '.join(SCENES)}), fox (photographs below --data-root), or any name that --data explains",
    )
    data: str | None = Field(
        None,
        description="a scene of your own: a folder (or file) in the format of nerfstudio or instant-ngp, COLMAP, LLFF, or a .npz of pictures and poses",
    )
    data_root: str | None = Field(None, description="folder that holds fox/ …; default: $LIMBECK_DATA")
    views: int = Field(24, ge=1, description="training views of an analytic scene")
    test_views: int = Field(8, ge=1, description="held-out views; of photographs every n-th, so that there are so many")
    view_size: int = Field(
        32,
        ge=8,
        description="side of an analytic scene's pictures, and about the longer side of photographs, in pixels",
    )
    scene_seed: int = Field(0, ge=0, description="seeds the cameras, and the shape of textured_shapes")


@dataclass
class SceneTask:
    """A scene in posed pictures.

    Attributes:
        name: what it is called.
        train, val, test: disjoint views. ``val`` is for choosing, ``test`` is looked at once.
        aabb: (2, 3) the box that holds what is seen, in world units.
        background: grey value behind the scene.
        truth: the scene itself, where it is analytic.
        transform: (4, 4) from the user's world coordinates to those of the cameras here, where they differ.
        points, colours: (P, 3) a cloud of the scene's points and their colours, where the photographs came with one.
        source: where it came from.
    """

    name: str
    train: PosedImages
    val: PosedImages
    test: PosedImages
    aabb: Tensor
    background: float = 1.0
    truth: AnalyticScene | None = None
    transform: Tensor | None = None
    points: Tensor | None = None
    colours: Tensor | None = None
    source: str = ""
    class_names: list[str] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        return self.train.fingerprint()

    def describe(self) -> dict[str, Any]:
        cameras = self.train.cameras
        return {
            "name": self.name,
            "source": self.source,
            "train": len(self.train),
            "val": len(self.val),
            "test": len(self.test),
            "picture": [cameras.height, cameras.width],
            "box": self.aabb.tolist(),
            "fingerprint": self.fingerprint,
        }


def load_scene(setup: SceneSetup) -> SceneTask:
    """The scene that a setup names.

    Raises:
        InputError, RunError: it does not exist, or cannot be read.
    """
    if setup.data is not None:
        return photographs(Path(setup.data).expanduser(), setup)
    if setup.task in SCENES:
        return analytic(setup.task, setup.views, setup.test_views, setup.view_size, setup.scene_seed)
    if setup.task == "fox":
        root = setup.data_root or os.environ.get("LIMBECK_DATA")
        if root is None:
            raise InputError(
                "the fox photographs are not bundled: name the folder that holds fox/ with --data-root (or $LIMBECK_DATA), or take "
                "an analytic scene with --task"
            )
        return photographs(Path(root).expanduser() / "fox", setup)
    known = ", ".join([*SCENES, "fox"])
    raise InputError(f"unknown scene '{setup.task}': there are {known}; or name a folder with --data")


def analytic(name: str, views: int = 24, test_views: int = 8, size: int = 32, seed: int = 0) -> SceneTask:
    """An analytic scene from cameras around it; ``terrain`` from above, looking down obliquely at random ground points.

    Held-out views stand elsewhere than the training views, at other azimuths and elevations.
    """
    if name == "terrain":
        return _terrain(views, test_views, size, seed)
    truth = scene(name, seed)
    parts = []
    for part, (count, own) in enumerate(((views, 0), (max(1, test_views // 2), 1), (test_views, 2))):
        seen = shots(truth, count, size, mix_seed(seed, own, part) % 2**31, samples=TRUE_SAMPLES)
        parts.append(PosedImages(seen.cameras, seen.images))
    train, val, test = parts
    return SceneTask(name, train, val, test, truth.aabb.clone(), 1.0, truth, source="analytic scene")


def _terrain(views: int, test_views: int, size: int, seed: int) -> SceneTask:
    truth = scene("terrain", seed)
    parts = []
    for part, count in enumerate((views, max(1, test_views // 2), test_views)):
        g = torch.Generator().manual_seed(mix_seed(seed, 211, part) % 2**31)
        targets = torch.cat([3.2 * torch.rand(count, 2, generator=g) - 1.6, torch.zeros(count, 1)], 1)
        angle = 2 * torch.pi * torch.rand(count, generator=g)
        away = torch.stack([0.7 * angle.cos(), 0.7 * angle.sin(), torch.full((count,), 1.5)], 1)
        focal = torch.full((count,), 0.5 * size / 0.5)  # a field of view of 53 degrees
        middle = torch.tensor(size / 2)
        cameras = Cameras(look_at(targets + away, targets), focal, focal, middle, middle, size, size)
        with torch.no_grad():
            images = render_image(truth, cameras, samples=TRUE_SAMPLES)["rgb"].clamp(0, 1)
        parts.append(PosedImages(cameras, images))
    train, val, test = parts
    return SceneTask("terrain", train, val, test, truth.aabb.clone(), 1.0, truth, source="analytic scene")


def photographs(path: Path, setup: SceneSetup) -> SceneTask:
    """Posed photographs, recentred on the point they look at and scaled so that the farthest camera is at distance 2.

    Every n-th is held out (in turns for testing and for choosing). The box holds the cloud of points, where there is one; else it has half the side 1
    times ``aabb_scale`` of the file, at most 2.

    Raises:
        InputError, RunError: nothing there, pictures missing, poses that are none.
    """
    if not path.exists():
        raise InputError(f"no scene at {path}: --data (or --data-root) names a folder of posed photographs")
    first = read_capture(path, images=False).cameras
    longest = max(first.width, first.height)
    views = read_capture(path, reduce=reduction(first.width, first.height, longest / setup.view_size))
    if views.images is None:
        raise InputError(f"{path} has poses but no pictures: put them beside the poses")
    cameras, transform = normalised(views.cameras, 2.0)
    count = len(cameras)
    if count < 4:
        raise InputError(f"{path} holds {count} pictures: at least 4 are needed to train on some and hold others out")
    every = max(2, count // max(1, min(2 * setup.test_views, count // 2)))
    held = torch.arange(0, count, every)
    kept = torch.tensor([i for i in range(count) if i % every], dtype=torch.long)
    whole = PosedImages(cameras, views.images)
    points = getattr(views, "points", None)
    if points is not None and len(points):
        points = points.to(transform) @ transform[:3, :3].T + transform[:3, 3]
        low, high = (torch.quantile(points, q, dim=0) for q in (0.02, 0.98))
        box = torch.stack([low, high]) + 0.05 * torch.stack([low - high, high - low])
    else:
        points, half = None, min(2.0, float(views.aabb_scale or 1.0))
        box = torch.tensor([[-half] * 3, [half] * 3])
    val = held[1::2] if len(held) > 1 else held
    return SceneTask(
        path.name if path.is_dir() else path.parent.name,
        whole.subset(kept),
        whole.subset(val),
        whole.subset(held[::2]),
        box,
        0.0,
        transform=transform,
        points=points,
        colours=None if points is None else views.colours,  # type: ignore[attr-defined]
        source=f"{count} photographs",
    )


def reduction(width: int, height: int, wanted: float) -> int:
    """The whole factor nearest to ``wanted`` by which both sides are divisible, 1 at least."""
    fitting = [n for n in range(1, min(width, height) + 1) if width % n == 0 and height % n == 0]
    return min(fitting, key=lambda n: abs(n - wanted))
