from __future__ import annotations

import base64
import struct

import numpy as np

from limbeck.report.landscapes import landscape_picture


def size(png: str) -> tuple[int, int]:
    data = base64.b64decode(png)
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


def test_a_second_panel_shows_the_line():
    x, y = np.linspace(0, 1, 4), np.linspace(0, 2, 3)
    values = np.arange(12.0).reshape(3, 4)  # a zero cannot be shown on a logarithmic scale and is lifted
    alone = landscape_picture(x, y, values, {"teacher": (0, 0)}, "loss")
    curves = {"linear_probe": [0.3, 0.4], "knn_probe": [0.2, 0.3]}
    both = landscape_picture(x, y, values, {"teacher": (0, 0)}, "loss", positions=[0, 1], curves=curves)
    assert size(both)[0] > 1.5 * size(alone)[0]


def test_values_without_a_positive_one_are_drawn():
    x = np.linspace(0, 1, 2)
    for values in (np.zeros((2, 2)), np.full((2, 2), np.nan), np.full((2, 2), 3.0)):
        assert min(size(landscape_picture(x, x, values, {}, "loss"))) > 100
