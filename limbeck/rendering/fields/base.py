r"""The interface of every volume field: positions and directions in, density and colour out.

A field is split where distillation between families splits it: ``encode`` (the shallow part) turns positions into a feature volume,
``decode`` (the deep part) turns that into density and colour. What families share beyond this is the *volume-aligned feature*
``[log density, 15 geometry channels]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.artifacts import DESCRIPTION, WEIGHTS, save_weights
from limbeck.core.errors import InputError
from limbeck.core.files import write_json

GEO = 15  # geometry channels beside the log density in the volume-aligned feature
EMPTY = -12.0  # the log density reported where there is nothing; exp(-12) is invisible at any step length in use
UNIT_BOX = ((-1.0, -1.0, -1.0), (1.0, 1.0, 1.0))
Box = Tensor | Sequence[Sequence[float]]


class _TruncatedExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x.clamp(-12, 12).exp()


def trunc_exp(x: Tensor) -> Tensor:
    """``exp(x)`` whose gradient is ``exp(clamp(x, -12, 12))``: steep densities neither blow the gradient up nor kill it.

    Source: "Instant Neural Graphics Primitives with a Multiresolution Hash Encoding" (its code).
    """
    found: Tensor = _TruncatedExp.apply(x)
    return found


@dataclass(frozen=True)
class Density:
    r"""How a raw output h at position x becomes a density sigma >= 0 (per unit length).

    .. math:: l = \mathrm{clamp}(h + s + b(x), low, high),\; \sigma = e^l \quad\text{or}\quad
              \sigma = \log(1 + e^{h + s + b(x)}),\; l = \mathrm{clamp}(\log\sigma, low, high)

    Biases (b), with r = \|x\| in world units: ``blob_magic3d`` = scale (1 - r/std), ``blob_dreamfusion`` = scale exp(-r^2 / (2 std^2)),
    ``none`` = 0. A negative ``scale`` turns a blob into a shell around an empty centre.

    Attributes:
        activation: ``trunc_exp`` or ``softplus``.
        bias, scale, std: b(x).
        shift: s, a constant.
        low, high: limits of the log density, None for no limit. With ``trunc_exp`` they limit the density as well: at -2 empty space keeps a density
            of 0.14, which an occupancy grid does not skip; lower it where skipping matters. Outside the limits there is no gradient.
    """

    activation: Literal["trunc_exp", "softplus"] = "trunc_exp"
    bias: Literal["none", "blob_magic3d", "blob_dreamfusion"] = "none"
    scale: float = 10.0
    std: float = 0.5
    shift: float = 0.0
    low: float | None = -2.0
    high: float | None = 7.0

    def __post_init__(self) -> None:
        if self.activation not in ("trunc_exp", "softplus"):
            raise InputError(f"a density activation is trunc_exp or softplus (got '{self.activation}')")
        if self.bias not in ("none", "blob_magic3d", "blob_dreamfusion"):
            raise InputError(f"a density bias is none, blob_magic3d or blob_dreamfusion (got '{self.bias}')")
        if not self.std > 0:
            raise InputError(f"the width of a density bias is above 0 (got std={self.std})")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise InputError(f"the limits of the log density need low < high (got {self.low} and {self.high})")

    @classmethod
    def generation(cls) -> Density:
        """An object of radius about 0.5 around the origin, softplus, no limits ("Magic3D")."""
        return cls("softplus", "blob_magic3d", 10.0, 0.5, low=None, high=None)

    @classmethod
    def dreamfusion(cls) -> Density:
        """A Gaussian bump of width 0.2 in the exponent, no limits ("DreamFusion")."""
        return cls("trunc_exp", "blob_dreamfusion", 5.0, 0.2, low=None, high=None)

    @classmethod
    def scene(cls) -> Density:
        """A dense shell from radius 2.5 on with the camera in the empty centre, softplus ("ProlificDreamer")."""
        return cls("softplus", "blob_magic3d", -10.0, 2.5, low=None, high=None)

    def offset(self, x: Tensor) -> Tensor:
        """s + b(x), (N,)."""
        if self.bias == "none":
            return x.new_full(x.shape[:1], self.shift)
        squares = x.square().sum(-1)
        if self.bias == "blob_magic3d":
            # the square root has no gradient at the origin
            return self.shift + self.scale * (1 - squares.clamp_min(1e-12).sqrt() / self.std)
        return self.shift + self.scale * torch.exp(-squares / (2 * self.std**2))

    def __call__(self, raw: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Density and log density (N,) of raw outputs (N,) at positions (N, 3); positions may be left out where there is no bias."""
        if x is None and self.bias != "none":
            raise InputError(f"the density bias {self.bias} depends on the position: give decode() the positions too")
        z = raw + self.shift if x is None else raw + self.offset(x)
        if self.activation == "trunc_exp":
            log_sigma = self._limited(z)
            return trunc_exp(log_sigma), log_sigma
        sigma = F.softplus(z)
        # log softplus(z) = z up to rounding far below 0, where softplus itself underflows
        log_sigma = torch.where(z < -15, z, sigma.clamp_min(torch.finfo(z.dtype).tiny).log())
        return sigma, self._limited(log_sigma)

    def _limited(self, log_sigma: Tensor) -> Tensor:
        return log_sigma if self.low is None and self.high is None else log_sigma.clamp(self.low, self.high)


class VolumeField(nn.Module):
    """A density and a colour everywhere in a box.

    A family implements :meth:`encode`, :meth:`geometry`, :meth:`colour` and :meth:`config`. Outside the box the density is 0 and the
    log density the lower limit of the family's :class:`Density` (-12 without one).

    In evaluation mode a result that is not finite raises an :class:`InputError`; in training the run itself stops on NaN losses.

    Args:
        aabb: (2, 3) lowest and highest corner, world units.
        density: how raw outputs become densities; a mapping (from JSON) is accepted.

    Raises:
        InputError: a box whose corners are not ordered.
    """

    family: ClassVar[str] = ""
    feature_width: int | None = 1 + GEO
    eps: ClassVar[float] = 1e-8  # Adam's epsilon for the encoding
    density_noise: float = 0.0  # standard deviation of noise on raw densities, in training only
    aabb: Tensor

    def __init__(self, aabb: Box = UNIT_BOX, density: Density | dict[str, Any] | None = None) -> None:
        super().__init__()
        box = torch.as_tensor(aabb, dtype=torch.float32).detach().clone()
        if box.shape != (2, 3) or not bool(torch.isfinite(box).all()) or not bool((box[1] > box[0]).all()):
            raise InputError(f"a box is (2, 3), lowest and highest corner (got {box.tolist()})")
        self.register_buffer("aabb", box)
        self.density_law = Density(**density) if isinstance(density, dict) else density or Density()

    # ---- what a family says

    def encode(self, x: Tensor) -> Tensor:
        """Positions (N, 3) to the feature volume (N, F)."""
        raise NotImplementedError

    def geometry(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encoded features to the raw density (N,) and the geometry channels (N, 15), or None where the family has none."""
        raise NotImplementedError

    def colour(self, h: Tensor, geo: Tensor | None, d: Tensor) -> Tensor:
        """Colours (N, 3) in [0, 1] seen along unit directions d (N, 3)."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON, such that ``build_field`` makes an equal field."""
        return {"aabb": self.aabb.tolist(), "density": asdict(self.density_law)}

    def encoding_parameters(self) -> list[nn.Parameter]:
        """Tables, grids and planes: what usually learns at a higher rate than the decoder."""
        return []

    # ---- what everybody calls

    def forward(self, x: Tensor, d: Tensor) -> dict[str, Tensor | None]:
        """Density and colour at positions x (N, 3) seen along unit directions d (N, 3).

        Returns:
            ``sigma`` (N,), ``rgb`` (N, 3), ``log_sigma`` (N,), ``feature`` (N, 16) or None.

        Raises:
            InputError: shapes that do not fit; NaN (evaluation mode).
        """
        self._check_points(x, d)
        h = self.encode(x)
        found, geo = self._densities(h, x)
        rgb = self.colour(h, geo, d)
        self._check_finite(rgb)
        return {**found, "rgb": rgb}

    def density(self, x: Tensor) -> dict[str, Tensor | None]:
        """``sigma``, ``log_sigma`` and ``feature`` at positions (N, 3), without colours."""
        self._check_points(x)
        return self._densities(self.encode(x), x)[0]

    def decode(self, h: Tensor, d: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Density (N,) and colour (N, 3) of encoded features (N, F) along directions (N, 3).

        Without the positions x nothing is known of the box, and a density with a bias raises an :class:`InputError`.
        """
        found, geo = self._densities(h, x)
        sigma = found["sigma"]
        assert sigma is not None
        return sigma, self.colour(h, geo, d)

    def normals(self, x: Tensor, eps: float = 1e-2) -> Tensor:
        """Outward normals ``-grad sigma / |grad sigma|`` (N, 3) by central differences of step ``eps`` (world units); 0 where flat."""
        steps = eps * torch.eye(3, dtype=x.dtype, device=x.device)
        around = torch.cat([x[:, None] + steps, x[:, None] - steps], 1)  # (N, 6, 3)
        sigma = self.density(around.reshape(-1, 3))["sigma"]
        assert sigma is not None
        ahead, behind = sigma.view(-1, 2, 3).unbind(1)
        return F.normalize(behind - ahead, dim=-1)

    def inside(self, x: Tensor) -> Tensor:
        """(N,) whether positions lie in the box, up to rounding."""
        low, high = self.aabb.to(x.dtype)
        slack = 1e-5 * (high - low)
        return ((x >= low - slack) & (x <= high + slack)).all(-1)

    def unit(self, x: Tensor) -> Tensor:
        """Positions as fractions of the box, clamped to [0, 1]^3."""
        low, high = self.aabb.to(x.dtype)
        return ((x - low) / (high - low)).clamp(0, 1)

    def param_groups(self, lr: float, decoder_lr: float | None = None) -> list[dict[str, Any]]:
        """Optimiser groups: the encoding at ``lr`` and the decoder at ``decoder_lr`` (None: the same); Adam's eps as the family needs it."""
        tables = self.encoding_parameters()
        known = {id(p) for p in tables}
        rest = [p for p in self.parameters() if id(p) not in known]
        groups = [
            {"name": "encoding", "params": tables, "lr": lr, "eps": self.eps},
            {"name": "decoder", "params": rest, "lr": lr if decoder_lr is None else decoder_lr, "eps": self.eps},
        ]
        return [group for group in groups if group["params"]]

    def check(self) -> None:
        """Raise an :class:`InputError` that names the first weight which is NaN or infinite."""
        for name, tensor in self.state_dict().items():
            if tensor.is_floating_point() and not bool((good := torch.isfinite(tensor)).all()):
                bad = tensor.numel() - int(good.sum())
                raise InputError(
                    f"the {self.family} field's weight '{name}' has {bad} of {tensor.numel()} values that are NaN or infinite: "
                    "its training diverged; take an earlier checkpoint or a lower learning rate"
                )

    def save(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` and ``artifact.json`` (family and constructor), which ``load_field`` reads.

        Raises:
            InputError: weights that are not finite. RunError: the folder cannot be written.
        """
        self.check()
        path = Path(folder)
        save_weights(self, path / WEIGHTS)
        write_json(path / DESCRIPTION, {"kind": "field", "family": self.family, "config": self.config()})

    def export(
        self, path: str | Path, resolution: int = 128, threshold: float | None = None, occupancy: Tensor | None = None
    ) -> Path:
        """Write the field for other programs; what is written follows the path, see :func:`limbeck.rendering.surfaces.export_field`."""
        from limbeck.rendering.surfaces import export_field

        return export_field(self, path, resolution, threshold, occupancy)

    # ---- inner parts

    def _densities(self, h: Tensor, x: Tensor | None) -> tuple[dict[str, Tensor | None], Tensor | None]:
        raw, geo = self.geometry(h)
        self._check_finite(raw)
        if self.training and self.density_noise:
            raw = raw + self.density_noise * torch.randn_like(raw)
        sigma, log_sigma = self.density_law(raw, x)
        if x is not None:
            inside = self.inside(x)
            floor = EMPTY if self.density_law.low is None else self.density_law.low
            sigma, log_sigma = torch.where(inside, sigma, 0.0), torch.where(inside, log_sigma, floor)
        feature = None if geo is None else torch.cat([log_sigma[:, None], geo], 1)
        return {"sigma": sigma, "log_sigma": log_sigma, "feature": feature}, geo

    def _check_finite(self, values: Tensor) -> None:
        if self.training or bool(torch.isfinite(values).all()):
            return
        self.check()
        raise InputError(
            f"the {self.family} field gives NaN or infinity with finite weights: are the positions finite?"
        )

    def _check_points(self, x: Tensor, d: Tensor | None = None) -> None:
        if x.ndim != 2 or x.shape[1] != 3:
            raise InputError(f"positions are (N, 3) (got {tuple(x.shape)})")
        if d is not None and d.shape != x.shape:
            raise InputError(
                f"every position needs one direction: {tuple(x.shape)} positions, {tuple(d.shape)} directions"
            )


def positive_int(name: str, value: int, least: int = 1) -> int:
    """``value`` if it is a whole number of at least ``least``.

    Raises:
        InputError: otherwise, naming the argument.
    """
    if int(value) != value or not math.isfinite(value) or value < least:
        raise InputError(f"{name} is a whole number of at least {least} (got {value})")
    return int(value)
