r"""Neural Gaussians on anchors: a few numbers per anchor, and one small decoder that makes Gaussians of them for each camera.

Of an anchor a with feature f, offsets o_1..o_k and log-scales l (6), seen along v = (a - cam)/|a - cam|,

.. math:: \mu_j = a + o_j\,e^{l_{1:3}},\quad (\alpha_j, c_j, s_j, q_j) = D_\theta(f, v),\quad
          \alpha_j = \tanh(\cdot),\; c_j = \mathrm{sigmoid}(\cdot),\; \sigma_j = e^{l_{4:6}}\,\mathrm{sigmoid}(s_j),\; q_j/|q_j|

and only Gaussians with an opacity above 0 are drawn.

Source: "Scaffold-GS: Structured 3D Gaussians for View-Adaptive Rendering".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.artifacts import DESCRIPTION, WEIGHTS, load_weights, register_kind, save_weights
from limbeck.core.errors import InputError, RunError
from limbeck.core.files import read_json, write_json
from limbeck.rendering.gaussians import neighbour_distance
from limbeck.rendering.rows import any_count
from limbeck.rendering.splatting import Splat, project, splat_tensors, stacked
from limbeck.rendering.views import View, view_of

NAMES = ("features", "offsets", "log_scales")
"""What is trained of anchors; their positions stay where they are, as published."""


class Attributes(NamedTuple):
    """What a decoder says of M anchors with k Gaussians each: opacities (M, k) in (-1, 1), colours (M, k, 3) in (0, 1), quats (M, k, 4)
    of length 1, scales (M, k, 3) in (0, 1), or times the anchors' scales where they are known."""

    opacities: Tensor
    colours: Tensor
    quats: Tensor
    scales: Tensor


class AnchorDecoder(nn.Module):
    """Three perceptrons of one hidden layer: opacity, colour, and shape (scale and rotation).

    Args:
        features: F, numbers per anchor. offsets: k, Gaussians per anchor. hidden: units.
        distance: whether the decoder also sees how far the camera is.
        opacity: what the opacities are like at first, in (-1, 1). Around 0, where the released code begins, half of the Gaussians are not drawn,
            get no gradient and may stay so for good.

    Raises:
        InputError: sizes below 1.
    """

    def __init__(
        self, features: int = 32, offsets: int = 10, hidden: int = 32, distance: bool = False, opacity: float = 0.4
    ) -> None:
        super().__init__()
        if not -1 < opacity < 1:
            raise InputError(f"an opacity here lies between -1 and 1 (got {opacity})")
        if min(features, offsets, hidden) < 1:
            raise InputError(f"a decoder has sizes of 1 or more (got {features}, {offsets}, {hidden})")
        self.features, self.offsets, self.hidden, self.distance = features, offsets, hidden, distance
        inputs = features + 3 + distance

        def perceptron(outputs: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))

        self.opacity = perceptron(offsets)
        last: Any = self.opacity[2]
        nn.init.constant_(last.bias, math.atanh(opacity))
        self.colour = perceptron(3 * offsets)
        self.covariance = perceptron(7 * offsets)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "features": self.features,
            "offsets": self.offsets,
            "hidden": self.hidden,
            "distance": self.distance,
        }

    def forward(self, features: Tensor, directions: Tensor, distances: Tensor | None = None) -> Attributes:
        """
        Args:
            features: (M, F). directions: (M, 3) of length 1, from the camera to the anchor. distances: (M,), world units.

        Raises:
            InputError: no distances for a decoder that wants them.
        """
        if self.distance and distances is None:
            raise InputError("this decoder sees distances: give them")
        more = [distances[:, None]] if self.distance and distances is not None else []
        seen = torch.cat([features, directions, *more], 1)
        shape = self.covariance(seen).unflatten(1, (self.offsets, 7))
        return Attributes(
            torch.tanh(self.opacity(seen)),
            torch.sigmoid(self.colour(seen)).unflatten(1, (self.offsets, 3)),
            F.normalize(shape[..., 3:], dim=-1),
            torch.sigmoid(shape[..., :3]),
        )


class Anchors(nn.Module):
    """N anchors.

    Args:
        positions: (N, 3), a buffer. features: (N, F). offsets: (N, k, 3) in units of the first three scales. log_scales: (N, 6).

    Raises:
        InputError: shapes that do not fit each other.
    """

    positions: Tensor

    def __init__(self, positions: Tensor, features: Tensor, offsets: Tensor, log_scales: Tensor) -> None:
        super().__init__()
        count = len(positions)
        fits = (
            positions.shape == (count, 3)
            and features.ndim == 2
            and len(features) == count
            and offsets.ndim == 3
            and offsets.shape[::2] == (count, 3)
            and log_scales.shape == (count, 6)
        )
        if not fits:
            shapes = [tuple(value.shape) for value in (positions, features, offsets, log_scales)]
            raise InputError(f"N anchors are (N, 3), (N, F), (N, k, 3) and (N, 6), not {', '.join(map(str, shapes))}")
        self.register_buffer("positions", positions.detach().clone())
        self.features = nn.Parameter(features.detach().clone())
        self.offsets = nn.Parameter(offsets.detach().clone())
        self.log_scales = nn.Parameter(log_scales.detach().clone())
        any_count(self)

    @classmethod
    def from_points(
        cls, points: Tensor, features: int = 32, offsets: int = 10, voxel: float = 0.0, spread: float = 0.0
    ) -> Anchors:
        """One anchor in the middle of every voxel that holds points; features start at 0.

        All log-scales begin as the root mean squared distance to the three nearest anchors.

        Args:
            points: (P, 3). features: F. offsets: k. voxel: side of the voxels, world units; 0: the median distance of a point to its nearest.
            spread: standard deviation of the initial offsets, from torch's random state; published: 0.

        Raises:
            InputError: no points, or points that are not finite.
        """
        if points.ndim != 2 or points.shape[1] != 3 or not len(points):
            raise InputError(f"points must be (N, 3) with N of 1 or more, not {tuple(points.shape)}")
        if not bool(torch.isfinite(points).all()):
            raise InputError("points contain NaN or infinity: remove those rows first")
        if voxel < 0:
            raise InputError(f"a voxel's side is above 0, or 0 to be found (got {voxel})")
        side = voxel or float(neighbour_distance(points, 1).median())
        positions = torch.unique((points.detach() / side).round(), dim=0) * side
        count = len(positions)
        shift = spread * torch.randn(count, offsets, 3).to(points) if spread else points.new_zeros(count, offsets, 3)
        log_scales = neighbour_distance(positions).log()[:, None].expand(count, 6)
        return cls(positions, points.new_zeros(count, features), shift, log_scales)

    @classmethod
    def joined(cls, parts: Sequence[Anchors]) -> Anchors:
        """All anchors of several sets in one, in order."""
        return cls(*(torch.cat([getattr(part, name).detach() for part in parts]) for name in ("positions", *NAMES)))

    def __len__(self) -> int:
        return len(self.positions)

    def subset(self, which: Tensor) -> Anchors:
        """Copies of some of them: (N,) bool, or numbers."""
        return Anchors(*(getattr(self, name).detach()[which] for name in ("positions", *NAMES)))

    @property
    def scales(self) -> Tensor:
        """(N, 6): the unit of the offsets and the largest size of the Gaussians, world units."""
        return self.log_scales.exp()

    @torch.no_grad()
    def visible(self, view: View) -> Tensor:
        """(N,) whether an opaque Gaussian as wide as the anchor's reach touches the picture: the others need not be decoded."""
        count = len(self)
        quats = self.positions.new_tensor([1.0, 0, 0, 0]).expand(count, 4)
        ones = self.positions.new_ones(count)
        return project(self.positions, quats, self.scales[:, :3], ones, view).visible

    def points(self, which: Tensor | None = None) -> Tensor:
        """Centres of the Gaussians (M, k, 3)."""
        some: Any = slice(None) if which is None else which
        return self.positions[some, None] + self.offsets[some] * self.scales[some, None, :3]

    def attributes(
        self, decoder: nn.Module, centre: Tensor, which: Tensor | None = None, *, detach: bool = False
    ) -> Attributes:
        """What a decoder makes of the anchors, scales in world units.

        Args:
            decoder: usually an :class:`AnchorDecoder`. centre: (3,) of the camera. which: (M,) numbers; None: all.
            detach: let no gradient reach the anchors.
        """
        some: Any = slice(None) if which is None else which
        features, scales = self.features[some], self.scales[some, None, 3:]
        if detach:
            features, scales = features.detach(), scales.detach()
        away = self.positions[some] - centre.to(self.positions)
        distances = away.norm(dim=1)
        found: Attributes = decoder(features, away / distances.clamp_min(1e-9)[:, None], distances)
        return found._replace(scales=found.scales * scales)


@dataclass
class Drawn:
    """A picture of anchors and what it was made of.

    Attributes:
        splat: the picture; its radii and centres are those of the G Gaussians that were drawn.
        which: (M,) numbers of the anchors that were decoded. attributes: of their Gaussians. drawn: (M, k) opacity above 0, G of them.
    """

    splat: Splat
    which: Tensor
    attributes: Attributes
    drawn: Tensor


def draw_anchors(
    anchors: Anchors, decoder: nn.Module, camera: Any, background: Tensor | float = 0.0, *, index: int | None = None, **options: Any
) -> Drawn:  # fmt: skip
    """Decode the anchors that a camera may see, and draw their Gaussians.

    Args:
        anchors, decoder: the scene. camera: a :class:`View`, or ``Cameras`` of which ``index`` chooses one. background: grey value or
            colour (3,). options: of :func:`~limbeck.rendering.splatting.splat_tensors`.
    """
    view = view_of(camera, index)
    which = anchors.visible(view).nonzero()[:, 0]
    found = anchors.attributes(decoder, view.centre, which)
    drawn = found.opacities > 0
    picture = splat_tensors(
        anchors.points(which)[drawn],
        found.quats[drawn],
        found.scales[drawn],
        found.opacities[drawn],
        found.colours[drawn],
        view,
        background,
        **options,
    )
    return Drawn(picture, which, found, drawn)


class AnchorScene(nn.Module):
    """Anchors with their decoder: what is trained, kept and drawn."""

    def __init__(self, anchors: Anchors, decoder: AnchorDecoder) -> None:
        super().__init__()
        if (anchors.features.shape[1], anchors.offsets.shape[1]) != (decoder.features, decoder.offsets):
            raise InputError(
                f"anchors with {anchors.features.shape[1]} features and {anchors.offsets.shape[1]} offsets need a decoder of that size, "
                f"not {decoder.features} and {decoder.offsets}"
            )
        self.anchors, self.decoder = anchors, decoder

    def save(self, folder: str | Path, description: Mapping[str, Any] | None = None) -> None:
        """Write ``model.safetensors`` and ``artifact.json``, which :func:`read_anchors` reads.

        Raises:
            InputError: weights that are not finite. RunError: the folder cannot be written.
        """
        for name, value in self.state_dict().items():
            if not bool(torch.isfinite(value).all()):
                raise InputError(f"'{name}' of the anchors contains NaN or infinity: take an earlier checkpoint")
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        save_weights(self, path / WEIGHTS)
        write_json(path / DESCRIPTION, {**(description or {}), "kind": "anchors", "config": self.decoder.config()})


@dataclass(frozen=True)
class AnchorRenderer:
    """Anchors and decoder, drawn one camera after the other.

    Attributes:
        module: the scene. background: grey value or colour (3,).
    """

    module: AnchorScene
    background: Tensor | float = 1.0

    def __call__(self, cameras: Any, ids: Sequence[int] | None = None) -> dict[str, Tensor]:
        """``rgb`` (B, H, W, 3), ``opacity`` and ``depth`` (B, H, W)."""
        which = range(len(cameras)) if ids is None else ids
        scene = self.module
        return stacked(
            [draw_anchors(scene.anchors, scene.decoder, cameras, self.background, index=int(i)).splat for i in which]
        )


def read_anchors(folder: Path, description: Mapping[str, Any] | None = None) -> AnchorScene:
    """The scene that :meth:`AnchorScene.save` wrote, in evaluation mode.

    Raises:
        RunError: nothing there, damaged, or another kind of artifact.
    """
    about = read_json(Path(folder) / DESCRIPTION) if description is None else description
    if about.get("kind") != "anchors" or "config" not in about:
        raise RunError(f"{folder} holds no anchors (kind '{about.get('kind')}')")
    decoder = AnchorDecoder(**about["config"])
    none = torch.zeros(0, 3)
    empty = Anchors(
        none, none.new_zeros(0, decoder.features), none.new_zeros(0, decoder.offsets, 3), none.new_zeros(0, 6)
    )
    scene = AnchorScene(empty, decoder)
    load_weights(scene, Path(folder) / WEIGHTS)
    return scene.eval()


register_kind("anchors", read_anchors)
