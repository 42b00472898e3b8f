"""Particles: several scenes (or bare samples) that are optimised side by side, drawn as an optimiser wants to see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from limbeck.core.artifacts import DESCRIPTION
from limbeck.core.errors import InputError
from limbeck.core.files import read_json, write_json
from limbeck.rendering.cameras import Cameras
from limbeck.rendering.fields import VolumeField, read_field
from limbeck.rendering.rays import Rays
from limbeck.rendering.renderers import Renderer, VolumeRenderer
from limbeck.rendering.volume import (
    Background,
    alpha_entropy,
    normals_of,
    opaqueness,
    orientation,
    render_rays,
    sparsity,
)


class Particles(Protocol):
    """n things of one kind.

    Attributes:
        seen: whether they are seen through cameras; else a particle is a sample itself.
    """

    seen: bool

    def __len__(self) -> int: ...

    def draw(self, which: Tensor, cameras: Cameras | None) -> dict[str, Tensor]:
        """``images`` (B, ...) with gradient: particle ``which[b]`` in row b, or the one particle ``which`` (1,) from B cameras.

        Scenes add the regularisers' terms, scalars by name.
        """


class SampleParticles(nn.Module):
    """Samples themselves: points, vectors, images or latents. The two-dimensional playground of score distillation.

    Args:
        start: (n, ...) where they start.
    """

    seen = False

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        if start.ndim < 2 or not len(start) or not bool(torch.isfinite(start).all()):
            raise InputError(f"particles are (n, ...) finite numbers with n of 1 or more, not {tuple(start.shape)}")
        self.samples = nn.Parameter(start.detach().clone())

    def __len__(self) -> int:
        return len(self.samples)

    def draw(self, which: Tensor, cameras: Cameras | None = None) -> dict[str, Tensor]:
        return {"images": self.samples.index_select(0, which)}


REGULARISERS = ("sparsity", "opaque", "entropy", "orient", "z_variance", "variation", "smooth")


class SceneParticles(nn.Module):
    """Volume fields as particles, each drawn from all cameras of a step.

    Args:
        fields: n of them, one family or several.
        samples: on each ray. background: behind the fields.
        terms: regularisers to compute, of :data:`REGULARISERS`: see :mod:`limbeck.rendering.volume` for the first three; ``orient`` (surfaces face
            the viewer), ``z_variance`` (thin surfaces; where the opacity is above 1/2), ``variation`` (neighbours in grids and planes), ``smooth``
            (neighbouring pixels of the normal map).

    Raises:
        InputError: no fields, an unknown term.
    """

    seen = True

    def __init__(
        self,
        fields: Sequence[VolumeField],
        samples: int = 32,
        background: Background = 1.0,
        terms: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if not fields:
            raise InputError("particles need one field or more")
        unknown = [t for t in terms if t not in REGULARISERS]
        if unknown:
            raise InputError(f"there is no regulariser '{unknown[0]}': they are {', '.join(REGULARISERS)}")
        self.fields = nn.ModuleList(fields)
        self.samples, self.background, self.terms = samples, background, tuple(terms)

    def __len__(self) -> int:
        return len(self.fields)

    def draw(
        self, which: Tensor, cameras: Cameras | None, *, normals: bool = False, background: Background | None = None
    ) -> dict[str, Tensor]:
        """``images`` (B, 3, H, W) in [0, 1] of one particle, ``opacity`` (B, H, W), the wanted regularisers' terms.

        Args:
            which: (1,). cameras: B of them.
            normals: make ``normals`` (B, 3, H, W) as well: view-space normals times 0.5 plus 0.5, behind them (0.5, 0.5, 1).
            background: another one for this step.
        """
        if cameras is None:
            raise InputError("scenes are seen through cameras: give some")
        field: Any = self.fields[int(which[0])]
        each = [cameras.rays(i) for i in range(len(cameras))]
        rays = Rays(torch.cat([r.origins for r in each]), torch.cat([r.directions for r in each]))
        found = render_rays(
            field, rays, near=cameras.near, far=cameras.far, samples=self.samples, perturb=self.training,
            background=self.background if background is None else background,
        )  # fmt: skip
        shape = (len(cameras), cameras.height, cameras.width)
        made = {
            "images": found["rgb"].view(*shape, 3).movedim(-1, 1),
            "opacity": found["opacity"].view(shape),
        }
        slopes = None
        if normals or "orient" in self.terms or "smooth" in self.terms:
            slopes = normals_of(field, found["points"].flatten(0, 1), 1e-2).view_as(found["points"])
            world = (found["weights"][..., None] * slopes).sum(1)
            turn = cameras.c2w[:, :3, :3].repeat_interleave(shape[1] * shape[2], 0)
            local = (turn.mT @ world[..., None])[..., 0]
            empty = (1 - found["opacity"])[:, None] * local.new_tensor([0.0, 0.0, 1.0])
            made["normals"] = (0.5 * (local + empty) + 0.5).view(*shape, 3).movedim(-1, 1)
        return {**made, **self._terms(field, found, rays, slopes, made)}

    def _terms(
        self, field: Any, found: Mapping[str, Tensor], rays: Rays, slopes: Tensor | None, made: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        for name in self.terms:
            if name == "sparsity":
                terms[name] = sparsity(found["opacity"])
            elif name == "opaque":
                terms[name] = opaqueness(found["opacity"])
            elif name == "entropy":
                terms[name] = alpha_entropy(found["weights"])
            elif name == "z_variance":
                terms[name] = found["z_variance"].mean()
            elif name == "orient":
                assert slopes is not None
                terms[name] = orientation(found["weights"], slopes, rays.directions)
            elif name == "smooth":
                maps = made["normals"]
                terms[name] = maps.diff(dim=-1).square().mean() + maps.diff(dim=-2).square().mean()
            elif hasattr(field, "total_variation"):
                terms[name] = field.total_variation()
            else:
                raise InputError(f"a {field.family} field has no grid whose variation could be penalised")
        return terms

    def renderers(self, samples: int | None = None) -> list[Renderer]:
        """How each particle is drawn for people, with twice the samples unless said otherwise."""
        return [VolumeRenderer(f, samples or 2 * self.samples, background=self.background) for f in self.fields]

    def save(self, folder: str | Path) -> None:
        """One particle as a field's folder; several as ``particle-0``, ``particle-1`` … below it."""
        path = Path(folder)
        if len(self) == 1:
            self.fields[0].save(path)  # type: ignore[operator]
            return
        for number, field in enumerate(self.fields):
            field.save(path / f"particle-{number}")  # type: ignore[operator]
        write_json(path / DESCRIPTION, {"kind": "fields", "count": len(self)})


def read_particles(folder: Path, description: Mapping[str, Any]) -> list[VolumeField]:
    """The fields in the folder of an artifact of kind ``fields``."""
    parts = [folder / f"particle-{number}" for number in range(int(description["count"]))]
    return [read_field(part, read_json(part / DESCRIPTION)) for part in parts]
