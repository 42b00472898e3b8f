from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.errors import InputError
from limbeck.rendering.cameras import orbit
from limbeck.rendering.fields import HashField
from limbeck.rendering.fields.foreign import ForeignField, as_field
from limbeck.rendering.scenes import scene
from limbeck.rendering.volume import render_image

torch.set_num_threads(1)
BALL = scene("split_sphere")


def points(n: int = 50) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, d = torch.randn(2, n, 3, generator=g)
    return 0.5 * x, torch.nn.functional.normalize(d, dim=1)


class Radiance(nn.Module):
    """As nerfacc's examples have it: (rgb, sigma), and a query for the density alone."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def query_density(self, x: Tensor) -> Tensor:
        self.asked += 1
        return BALL.density(x)["sigma"][:, None]

    def forward(self, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        found = BALL(x, d)
        return found["rgb"], found["sigma"][:, None]


def test_all_ways_to_say_it_are_one_field():
    x, d = points()
    inside = (x.abs() <= 1).all(1)
    wanted = BALL(x, d)
    ways: list[Any] = [lambda x, d: (BALL(x, d)["sigma"], BALL(x, d)["rgb"]), BALL, Radiance()]
    for way in ways:
        field = ForeignField(way).eval()
        found = field(x, d)
        assert torch.equal(found["sigma"], torch.where(inside, wanted["sigma"], 0))
        assert torch.equal(found["rgb"], wanted["rgb"]) and found["feature"] is None
        assert torch.equal(field.density(x)["sigma"], found["sigma"])
        assert torch.equal(found["log_sigma"], found["sigma"].clamp_min(1e-38).log().clamp(-2, 7))
    assert ways[2].asked == 1


def test_it_renders():
    cameras = orbit([30.0], 10.0, 3.0, 45.0, 12, 12)
    field = ForeignField(Radiance(), aabb=BALL.aabb)
    for name in ("rgb", "depth"):
        torch.testing.assert_close(render_image(field, cameras)[name], render_image(BALL, cameras)[name])


def test_a_feature_may_be_named():
    x, d = points(4)
    field = ForeignField(BALL, feature=lambda x: x.new_zeros(len(x), 16))
    assert field.feature_width == 16 and field(x, d)["feature"].shape == (4, 16)
    with pytest.raises(InputError, match=r"a feature is \(4, 16\)"):
        ForeignField(BALL, feature=lambda x: x)(x, d)


def test_fields_of_ours_stay_what_they_are():
    ours = HashField()
    assert as_field(ours) is ours and as_field(BALL) is BALL
    assert isinstance(as_field(Radiance()), ForeignField)


def test_bad_input_is_named():
    x, d = points(4)
    cases: list[tuple[Any, str]] = [
        (lambda x, d: x, "gives .sigma, rgb., not Tensor"),
        (lambda x, d: (x, x), "one density a point"),
        (lambda x, d: (x[:, 0], x[:, :2]), "gives colours"),
        (lambda x, d: (x[:, 0] * torch.nan, x), "NaN or infinity"),
    ]
    for source, told in cases:
        with pytest.raises(InputError, match=told):
            ForeignField(source).eval()(x, d)
    with pytest.raises(InputError, match="not int"):
        ForeignField(3)  # type: ignore[arg-type]
    field = ForeignField(BALL)
    for call in (lambda: field.save("x"), lambda: field.encode(x), field.config):
        with pytest.raises(InputError, match="a foreign field"):
            call()
