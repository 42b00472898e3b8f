"""Words for where a camera stands: what score distillation adds to a prompt, so that a prior draws the back as a back."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.rendering.cameras import Cameras

WORDS = ("", "front", "side", "back", "overhead")
"""By number; 0 is no word at all."""


def view_word_ids(
    azimuth: Tensor, elevation: Tensor, *, front: float = 45.0, back: float = 45.0, overhead: float = 60.0
) -> Tensor:
    """Numbers into :data:`WORDS` for angles in degrees, of their shape.

    Later rules override earlier ones, in the order side, front, back, overhead; so a view is never without a word.

    Args:
        azimuth: 0 is the front; any turn counts. elevation: 0 is level, 90 straight above.
        front: azimuths closer to 0 than this are the front (45, or 30 as VSD's configurations have it).
        back: azimuths closer to 180 than this are the back.
        overhead: elevations above this are overhead.

    Raises:
        InputError: angles of different shapes, thresholds outside [0, 180].
    """
    if azimuth.shape != elevation.shape:
        raise InputError(f"azimuths {tuple(azimuth.shape)} and elevations {tuple(elevation.shape)} must be as many")
    if not (0 <= front <= 180 and 0 <= back <= 180 and -90 <= overhead <= 90):
        raise InputError(
            f"thresholds of view words are angles in degrees (got front {front}, back {back}, overhead {overhead})"
        )
    away = ((azimuth + 180) % 360 - 180).abs()
    found = torch.full(azimuth.shape, WORDS.index("side"), dtype=torch.long, device=azimuth.device)
    found[away < front] = WORDS.index("front")
    found[away > 180 - back] = WORDS.index("back")
    found[elevation > overhead] = WORDS.index("overhead")
    return found


def view_words(azimuth: Tensor, elevation: Tensor, **thresholds: float) -> list[str]:
    """``front``, ``side``, ``back`` or ``overhead`` for each view; see :func:`view_word_ids`."""
    return [WORDS[k] for k in view_word_ids(azimuth, elevation, **thresholds).flatten().tolist()]


def with_view(prompt: str, word: str) -> str:
    """A prompt with a view's word, as in ``a lighthouse, back view``; without a word the prompt itself."""
    return f"{prompt}, {word} view" if word else prompt


def angles_of(cameras: Cameras) -> tuple[Tensor, Tensor]:
    """Azimuths and elevations (N,) in degrees: those on the cameras, otherwise those of their positions around the origin."""
    if cameras.azimuth is not None and cameras.elevation is not None:
        return cameras.azimuth, cameras.elevation
    x, y, z = cameras.positions.unbind(-1)
    return torch.rad2deg(torch.atan2(y, x)), torch.rad2deg(torch.atan2(z, torch.hypot(x, y)))
