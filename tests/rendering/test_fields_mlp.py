from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from limbeck.core.errors import InputError
from limbeck.rendering.fields import MLPField
from limbeck.rendering.fields.encodings import spherical_harmonics

torch.set_num_threads(1)


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


@pytest.mark.parametrize("skip", [None, 1, 2])
def test_the_network_by_numpy(skip: int | None):
    field = MLPField(levels=2, depth=3, width=8, skip=skip, features=5, hidden=7, sh_degree=1)
    x, d = torch.rand(6, 3), F.normalize(torch.randn(6, 3), dim=1)
    p = {name: array(value) for name, value in field.state_dict().items()}
    encoded = np.concatenate([array(x), *(w(2**k * array(x)) for k in range(2) for w in (np.sin, np.cos))], 1)
    h = encoded
    for i in range(3):
        if i == skip:
            h = np.concatenate([h, encoded], 1)
        h = np.maximum(h @ p[f"trunk.{i}.weight"].T + p[f"trunk.{i}.bias"], 0)
    h = h @ p["out.weight"].T + p["out.bias"]
    np.testing.assert_allclose(array(field.encode(x)), h, atol=1e-5)

    def head(values: np.ndarray, name: str, layers: int) -> np.ndarray:
        for i in range(layers):
            values = np.maximum(values, 0) if i else values
            values = values @ p[f"{name}.{2 * i}.weight"].T
        return values

    geometry = head(h, "geometry_head", 2)
    found = field(x, d)
    np.testing.assert_allclose(array(found["log_sigma"]), np.clip(geometry[:, 0], -2, 7), atol=1e-5)
    np.testing.assert_allclose(array(found["feature"])[:, 1:], geometry[:, 1:], atol=1e-5)
    logits = head(np.concatenate([array(spherical_harmonics(d, 1)), geometry[:, 1:]], 1), "colour_head.net", 3)
    np.testing.assert_allclose(array(found["rgb"]), 1 / (1 + np.exp(-logits)), atol=1e-5)


def test_bad_input_is_named():
    for arguments, told in (
        ({"depth": 3, "skip": 3}, "skip goes into a layer from 1 to 2"),
        ({"width": 0}, "width is a whole number"),
        ({"features": 1.5}, "features is a whole number"),
        ({"levels": -1}, "levels is a whole number of at least 0"),
    ):
        with pytest.raises(InputError, match=told):
            MLPField(**arguments)
