from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from limbeck.core.errors import InputError
from limbeck.rendering.turntable import write_gif

torch.set_num_threads(1)


def test_frames_come_back(tmp_path: Path):
    frames = torch.zeros(6, 10, 12, 3)
    for i in range(6):
        frames[i, :, 2 * i : 2 * i + 2] = torch.tensor([1.0, 0.2 * i, 0.4])
    write_gif(frames, tmp_path / "turn.gif", fps=25)
    with Image.open(tmp_path / "turn.gif") as image:
        assert image.n_frames == 6 and image.size == (12, 10) and image.info["loop"] == 0
        for i in range(6):
            image.seek(i)
            assert image.info["duration"] == 40
            found = np.asarray(image.convert("RGB"), dtype=float) / 255
            np.testing.assert_allclose(found, frames[i], atol=0.02)


def test_bad_input_is_named(tmp_path: Path):
    frames = torch.zeros(2, 4, 4, 3)
    for wrong, name, fps, told in (
        (frames[0], "a.gif", 20, "frames are"),
        (frames[:0], "a.gif", 20, "frames are"),
        (frames + torch.nan, "a.gif", 20, "NaN"),
        (frames, "a.mp4", 20, "written as .gif"),
        (frames, "a.gif", 60, "at most 50"),
    ):
        with pytest.raises(InputError, match=told):
            write_gif(wrong, tmp_path / name, fps)
    assert not list(tmp_path.iterdir())
