"""What lies behind a scene: random colours that keep a field from painting its background, and a small network of the direction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.core.errors import InputError
from limbeck.rendering.fields.base import positive_int
from limbeck.rendering.fields.encodings import frequency_encoding, frequency_width
from limbeck.rendering.fields.mlp import perceptron


class BackgroundNetwork(nn.Module):
    r"""The colour far away in a direction: :math:`bg(d) = \mathrm{sigmoid}(\mathrm{MLP}(\gamma(d)))`, for ``background=`` of ``render_rays``.

    Args:
        levels: octaves of the frequency encoding of d. hidden, layers: width and number of hidden layers.
        swap: in training, the chance that a call gives one random colour for all rays instead, so that the network cannot take over what
            belongs to the field; drawn from the global random state.

    Source: "DreamFusion: Text-to-3D using 2D Diffusion".
    """

    def __init__(self, levels: int = 4, hidden: int = 16, layers: int = 2, swap: float = 0.0) -> None:
        super().__init__()
        if not 0 <= swap <= 1:
            raise InputError(f"the chance of a random background lies in [0, 1] (got {swap})")
        self.levels, self.swap = positive_int("levels", levels, 0), float(swap)
        widths = [positive_int("hidden", hidden)] * positive_int("layers", layers)
        self.net = perceptron([frequency_width(3, levels), *widths, 3])

    def forward(self, directions: Tensor) -> Tensor:
        """Colours (R, 3) in (0, 1) of unit directions (R, 3)."""
        if self.training and self.swap and float(torch.rand(())) < self.swap:
            return torch.rand(3).to(directions).expand_as(directions)
        found: Tensor = self.net(frequency_encoding(directions, self.levels))
        return found.sigmoid()


def random_per_image(ids: Tensor) -> Tensor:
    """(R, 3) colours in [0, 1), one for all rays with the same picture's number in ``ids`` (R,), from the global random state."""
    found, place = torch.unique(ids, return_inverse=True)
    return torch.rand(len(found), 3).to(ids.device)[place]


def random_per_ray(rays: int, device: torch.device | str | None = None) -> Tensor:
    """(R, 3) colours in [0, 1), one for each ray, from the global random state. The targets need the same: see :func:`over`."""
    return torch.rand(rays, 3).to(device)


def over(rgb: Tensor, alpha: Tensor, background: Tensor | float, previous: Tensor | float | None = None) -> Tensor:
    """Colours with straight alpha on a background: alpha c + (1 - alpha) bg.

    Args:
        rgb: (..., 3). alpha: (...). background: a number, (3,) or (..., 3).
        previous: the background that ``rgb`` stands on already (then it is exchanged), or None where ``rgb`` is not composited.
    """
    if alpha.shape != rgb.shape[:-1]:
        raise InputError(f"alpha of colours {tuple(rgb.shape)} is {tuple(rgb.shape[:-1])}, not {tuple(alpha.shape)}")
    see = 1 - alpha[..., None]
    return alpha[..., None] * rgb + see * background if previous is None else rgb + see * (background - previous)
