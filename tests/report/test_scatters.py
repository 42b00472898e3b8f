from __future__ import annotations

import base64

import numpy as np
import pytest

from limbeck.report.scatters import principal_plane, scatter_png


def test_the_plane_keeps_the_distances_that_vary_most() -> None:
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(40, 2)) * [5, 2]
    turned = flat @ np.linalg.qr(rng.normal(size=(6, 6)))[0][:2] + 3
    found = principal_plane(turned)
    between = np.linalg.norm(found[:, None] - found, axis=-1)
    np.testing.assert_allclose(between, np.linalg.norm(flat[:, None] - flat, axis=-1), atol=1e-8)
    assert found[:, 0].std() > found[:, 1].std()


@pytest.mark.parametrize("width", [2, 5])
def test_a_picture_of_two_panels(width: int) -> None:
    points = np.random.default_rng(0).normal(size=(30, width))
    png = base64.b64decode(scatter_png({"student": points, "teacher": -points}, np.arange(30) % 3, ["a", "b", "c"]))
    assert png.startswith(b"\x89PNG") and len(png) > 2000
