from __future__ import annotations

import base64
import io

import matplotlib.image
import numpy as np
import pytest

from limbeck.core.errors import InputError
from limbeck.report.sample_grids import sample_grid, scatter_grid


def pixels(png: str) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(base64.b64decode(png)), format="png")[..., :3]


def flat(colour: tuple[int, int, int], n: int = 2) -> np.ndarray:
    return np.tile(np.array(colour, np.uint8).reshape(1, 3, 1, 1), (n, 1, 8, 8))


def test_columns_stand_side_by_side_and_rows_below_each_other() -> None:
    first, second = flat((255, 0, 0)), flat((0, 0, 255))
    second[1] = flat((0, 255, 0), 1)[0]
    shown = pixels(sample_grid({"one step": first, "teacher, 50 steps": second}, ["3", "7"]))
    red, blue, green = ((np.abs(shown - c).max(-1) < 0.02).nonzero() for c in ((1, 0, 0), (0, 0, 1), (0, 1, 0)))
    assert red[1].max() < blue[1].min() and blue[0].max() < green[0].min()
    assert len(red[0]) == pytest.approx(2 * len(blue[0]), rel=0.05) and len(blue[0]) > 1000
    assert np.abs(red[1].mean() - blue[1].mean()) > 50


def test_grey_images_keep_their_shade_without_stretching() -> None:
    shown = pixels(sample_grid({"a": np.full((1, 1, 8, 8), 128, np.uint8)}))
    grey = np.abs(shown - 128 / 255).max(-1) < 0.01
    assert grey.sum() > 1000


def test_points_of_each_sampler_have_a_panel_and_strays_are_counted() -> None:
    data = np.random.default_rng(0).normal(size=(200, 2))
    few, many = (pixels(scatter_grid({"s": data[:n]}, data)) for n in (3, 200))

    def blue(shown: np.ndarray) -> int:
        return int((shown[..., 2] - shown[..., 0] > 0.2).sum())

    assert blue(many) > 5 * blue(few) > 0
    outside = np.array([[100.0, 0], [0, 0], [np.nan, 0]])
    assert not np.array_equal(
        pixels(scatter_grid({"s": outside}, data)), pixels(scatter_grid({"s": outside[1:2]}, data))
    )
    five = pixels(scatter_grid({f"s{n}": data for n in range(5)}, limit=3.0))
    assert five.shape[0] == pytest.approx(2 * 2.35 * 110, abs=2) and five.shape[1] == pytest.approx(
        4 * 2.1 * 110, abs=2
    )


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(InputError, match="must be as many"):
        sample_grid({"a": flat((0, 0, 0)), "b": flat((0, 0, 0), 3)})
    with pytest.raises(InputError, match="must be as many .*1 labels"):
        sample_grid({"a": flat((0, 0, 0))}, ["1"])
    with pytest.raises(InputError, match="'a' must be uint8"):
        sample_grid({"a": np.zeros((1, 1, 8, 8))})
    with pytest.raises(InputError, match="one column"):
        sample_grid({})
    with pytest.raises(InputError, match="'s' must be points"):
        scatter_grid({"s": np.zeros((4, 3))})
    with pytest.raises(InputError, match="one panel"):
        scatter_grid({})
