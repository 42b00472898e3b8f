"""Turntables: frames of a moving camera as an animated GIF that any browser plays."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.core.files import atomic_path


def write_gif(frames: Tensor, path: str | Path, fps: float = 20.0, loop: int = 0) -> None:
    """Write frames (N, H, W, 3) in [0, 1] as an animated GIF with one palette of 256 colours, so that nothing flickers.

    Args:
        frames: at least one; values beyond [0, 1] are clipped. path: ends in ``.gif``.
        fps: frames a second, above 0 and at most 50; the format counts in hundredths of a second.
        loop: how often it plays, 0 for ever.

    Raises:
        InputError: another shape, NaN, fps out of range, another ending. RunError: the file cannot be written.
    """
    target = Path(path)
    if target.suffix.lower() != ".gif":
        raise InputError(f"a turntable is written as .gif (got '{target.name}')")
    if frames.ndim != 4 or frames.shape[3] != 3 or not frames.numel():
        raise InputError(f"frames are (N, H, W, 3) (got {tuple(frames.shape)})")
    if not 0 < fps <= 50:
        raise InputError(f"a GIF plays more than 0 and at most 50 frames a second (got {fps})")
    values = frames.detach().float().cpu()
    if not bool(torch.isfinite(values).all()):
        raise InputError("the frames have values that are NaN or infinite")
    pixels = (values.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    some = pixels[:: max(1, len(pixels) // 16)]
    palette = Image.fromarray(some.reshape(-1, pixels.shape[2], 3)).quantize(256)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in pixels]
    duration = 10 * max(2, round(100 / fps))
    with atomic_path(target) as temporary:
        images[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=images[1:],
            duration=duration,
            loop=loop,
            optimize=False,
        )
