from __future__ import annotations

import base64

import numpy as np

from limbeck.report.code_pictures import code_pictures, purities


def test_purity_is_the_share_of_the_codes_most_frequent_class() -> None:
    codes, labels = np.array([0, 0, 0, 2, 2, 5]), np.array([1, 1, 0, 2, -1, 1])
    np.testing.assert_allclose(purities(codes, labels), [2 / 3, 2 / 3, 2 / 3, 1, 1])


def test_two_pictures() -> None:
    rng = np.random.default_rng(0)
    features = {"a": rng.standard_normal((20, 4)), "b": np.zeros((20, 3))}
    found = code_pictures(rng.integers(0, 3, 20), rng.integers(-1, 3, 20), features, ["x", "y", "z"])
    assert [p["title"] for p in found] == ["Purity of codes", "Code space"]
    assert all(base64.b64decode(p["png"]).startswith(b"\x89PNG") for p in found)
