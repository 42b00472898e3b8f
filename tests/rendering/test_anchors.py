from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from limbeck.core.artifacts import load
from limbeck.core.errors import InputError, RunError
from limbeck.rendering.anchor_baking import baked
from limbeck.rendering.anchor_growing import AnchorGrowing, GrowingRule, picture_gradients
from limbeck.rendering.anchors import (
    AnchorDecoder,
    AnchorRenderer,
    Anchors,
    AnchorScene,
    Attributes,
    draw_anchors,
    read_anchors,
)
from limbeck.rendering.cameras import orbit
from limbeck.rendering.rows import change_rows, set_rows
from limbeck.rendering.splatting import splat, splat_tensors
from limbeck.rendering.views import view_of

torch.set_num_threads(1)


def anchors(count: int = 12, features: int = 5, offsets: int = 3) -> Anchors:
    torch.manual_seed(4)
    made = Anchors.from_points(0.5 * torch.randn(count, 3), features, offsets, voxel=0.01, spread=0.4)
    made.features.data.normal_()
    return made


def scene(**options: object) -> AnchorScene:
    made = anchors(**options)  # type: ignore[arg-type]
    torch.manual_seed(5)
    return AnchorScene(made, AnchorDecoder(made.features.shape[1], made.offsets.shape[1], 8))


VIEWS = orbit([10.0, 130.0, 250.0], 20.0, 3.0, 45.0, 20, 16)


def test_one_gaussian_from_the_equations():
    made = scene()
    view = view_of(VIEWS, 1)
    found = made.anchors.attributes(made.decoder, view.centre)
    away = made.anchors.positions[7] - VIEWS.positions[1]
    seen = torch.cat([made.anchors.features[7], away / away.norm()])

    def two_layers(net: nn.Sequential) -> torch.Tensor:
        first, _, last = net
        return last.weight @ (first.weight @ seen + first.bias).clamp(min=0) + last.bias

    shape = two_layers(made.decoder.covariance).view(3, 7)[2]
    scales = made.anchors.log_scales[7].exp()
    torch.testing.assert_close(found.opacities[7], two_layers(made.decoder.opacity).tanh())
    torch.testing.assert_close(found.colours[7, 2], two_layers(made.decoder.colour)[6:9].sigmoid())
    torch.testing.assert_close(found.scales[7, 2], scales[3:] * shape[:3].sigmoid())
    torch.testing.assert_close(found.quats[7, 2], shape[3:] / shape[3:].norm())
    expected = made.anchors.positions[7] + made.anchors.offsets[7, 2] * scales[:3]
    torch.testing.assert_close(made.anchors.points()[7, 2], expected)


def test_only_opacities_above_zero_are_drawn():
    made = scene()
    made.decoder.opacity[2].bias.data = torch.tensor([0.3, -0.3, 0.02])
    view = view_of(VIEWS, 0)
    found = draw_anchors(made.anchors, made.decoder, VIEWS, 0.7, index=0)
    whole = made.anchors.attributes(made.decoder, view.centre)
    assert 0 < int((whole.opacities > 0).sum()) < whole.opacities.numel()
    means, opacities = made.anchors.points().flatten(0, 1), whole.opacities.flatten()
    kept = [i for i, o in enumerate(opacities.tolist()) if o > 0]
    parts = (whole.quats, whole.scales, whole.colours)
    quats, scales, colours = (value.flatten(0, 1)[kept] for value in parts)
    expected = splat_tensors(means[kept], quats, scales, opacities[kept], colours, view, 0.7)
    torch.testing.assert_close(found.splat.rgb, expected.rgb)
    assert len(found.splat.radii) == int(found.drawn.sum())


def test_nothing_to_draw_gives_the_background_and_no_gradient():
    made = scene()
    made.decoder.opacity[2].bias.data.fill_(-9)
    found = draw_anchors(made.anchors, made.decoder, VIEWS, torch.tensor([0.1, 0.2, 0.3]), index=0)
    torch.testing.assert_close(found.splat.rgb, torch.tensor([0.1, 0.2, 0.3]).expand(16, 20, 3))
    assert float(found.splat.alpha.abs().max()) == 0
    behind = VIEWS[0]
    behind.c2w[:, :3, 0] *= -1
    behind.c2w[:, :3, 2] *= -1
    assert not bool(made.anchors.visible(view_of(behind)).any())


def test_gradients_reach_decoder_and_anchors_but_not_the_anchors_of_a_detached_decoder():
    made = scene()
    centre = VIEWS.positions[0]
    found = made.anchors.attributes(made.decoder, centre, torch.arange(4), detach=True)
    sum(value.sum() for value in found).backward()
    assert made.anchors.features.grad is None and made.anchors.log_scales.grad is None
    assert all(p.grad is not None for p in made.decoder.parameters())
    draw_anchors(made.anchors, made.decoder, VIEWS, index=0).splat.rgb.sum().backward()
    for name in ("features", "offsets", "log_scales"):
        assert float(getattr(made.anchors, name).grad.abs().max()) > 0, name
    assert not made.anchors.positions.requires_grad


def test_points_that_share_a_voxel_give_one_anchor():
    points = torch.tensor([[0.01, 0, 0], [0.04, 0, 0], [0.3, 0, 0], [0, -0.21, 0]])
    made = Anchors.from_points(points, 4, 2, voxel=0.1)
    assert sorted(made.positions.tolist()) == sorted(torch.tensor([[0.0, 0, 0], [0.3, 0, 0], [0, -0.2, 0]]).tolist())
    assert bool((made.features == 0).all()) and bool((made.offsets == 0).all())
    reach = made.log_scales[made.positions[:, 0] > 0.2][0].exp()
    torch.testing.assert_close(reach, torch.tensor((0.3**2 + 0.3**2 + 0.2**2) / 2).sqrt().expand(6))


def test_the_distance_is_seen_where_it_is_asked_for():
    decoder = AnchorDecoder(2, 3, 4, distance=True)
    f, v = torch.randn(5, 2), torch.nn.functional.normalize(torch.randn(5, 3), dim=1)
    near, far = decoder(f, v, torch.ones(5)), decoder(f, v, torch.full((5,), 4.0))
    assert float((near.colours - far.colours).detach().abs().max()) > 1e-3
    with pytest.raises(InputError, match="sees distances"):
        decoder(f, v)


def test_saved_and_loaded(tmp_path: Path):
    made = scene()
    made.save(tmp_path, {"method": "x"})
    again = load(tmp_path)
    assert again.kind == "anchors" and again.description["method"] == "x"
    with torch.no_grad():
        torch.testing.assert_close(AnchorRenderer(again.content)(VIEWS)["rgb"], AnchorRenderer(made)(VIEWS)["rgb"])
    with pytest.raises(RunError, match="holds no anchors"):
        read_anchors(tmp_path, {"kind": "field"})
    made.anchors.features.data[2, 1] = float("nan")
    with pytest.raises(InputError, match=r"anchors\.features"):
        made.save(tmp_path)


def test_a_state_of_another_count_loads():
    few, many = anchors(4), anchors(9)
    few.load_state_dict(many.state_dict())
    assert len(few) == 9 and torch.equal(few.offsets, many.offsets) and torch.equal(few.positions, many.positions)


class Fixed(nn.Module):
    """Attributes that do not depend on the view."""

    def __init__(self, count: int, k: int) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.features, self.offsets = 5, k
        self.value = Attributes(
            torch.rand(count, k) - 0.3,
            torch.rand(count, k, 3),
            torch.nn.functional.normalize(torch.randn(count, k, 4), dim=-1),
            torch.rand(count, k, 3) + 0.2,
        )
        self.register_buffer("ids", torch.zeros(0))

    def forward(self, features: torch.Tensor, directions: torch.Tensor, distances: torch.Tensor) -> Attributes:
        which = features[:, 0].round().long()
        return Attributes(*(value[which] for value in self.value))


def test_baking_is_exact_where_nothing_depends_on_the_view():
    made = anchors()
    made.features.data[:, 0] = torch.arange(len(made)).float()
    made.log_scales.data[:, 3:] -= 1
    fixed = AnchorScene(made, Fixed(len(made), 3))  # type: ignore[arg-type]
    plain = baked(fixed, VIEWS, sh_degree=1)
    assert len(plain) == int((fixed.decoder.value.opacities >= 1 / 255).sum())  # type: ignore[union-attr]
    assert float(plain.sh_rest.detach().abs().max()) < 1e-3
    with torch.no_grad():
        expected = AnchorRenderer(fixed, 0.5)(VIEWS)["rgb"]
        for i in range(3):
            torch.testing.assert_close(splat(plain, VIEWS, 0.5, index=i).rgb, expected[i], atol=2e-4, rtol=0)
    with pytest.raises(InputError, match="seen by any camera"):
        fixed.decoder.value = fixed.decoder.value._replace(opacities=-torch.ones(len(made), 3))  # type: ignore[union-attr]
        baked(fixed, VIEWS)


# ---- growing -----------------------------------------------------------------------------------------------------------------


def grown(rule: GrowingRule, pulls: dict[tuple[int, int], float], made: Anchors) -> AnchorGrowing:
    growing = AnchorGrowing(made, rule)
    growing.seen += 10
    growing.opacity += 10
    growing.drawn += 10
    for place, mean in pulls.items():
        growing.gradient[place] = 10 * mean
    return growing


def test_the_gradient_is_that_of_half_a_picture():
    made = scene()
    view = view_of(VIEWS, 0)
    found = draw_anchors(made.anchors, made.decoder, view)
    (found.splat.rgb[..., 0] ** 2).sum().backward()
    grad = found.splat.means2d.grad
    expected = torch.stack([grad[:, 0] * 10, grad[:, 1] * 8], 1).norm(dim=1)
    torch.testing.assert_close(picture_gradients(found.splat, view), expected)
    growing = AnchorGrowing(made.anchors, GrowingRule())
    growing.record(found, view)
    assert growing.seen.sum() == len(found.which)
    torch.testing.assert_close(growing.gradient[found.which][found.drawn], expected * (found.splat.radii > 0))
    torch.testing.assert_close(growing.opacity[found.which], found.attributes.opacities.clamp(min=0).sum(1).detach())


@pytest.mark.parametrize(("pull", "expected"), [(1.5, set()), (3.0, {4.0}), (5.0, {4.0, 2.0})])
def test_an_anchor_is_put_where_a_gaussian_is_pulled_and_nothing_stands(pull: float, expected: set[float]):
    """The coarsest voxel (side 16) is taken; those of side 4 and 1 want twice and four times the threshold."""
    torch.manual_seed(0)
    made = Anchors.from_points(torch.tensor([[0.0, 0, 0], [90.0, 0, 0]]), 2, 2, voxel=1.0)
    made.log_scales.data.zero_()
    made.offsets.data[0, 1] = torch.tensor([2.1, 0.0, 0.0])
    made.features.data[0] = torch.tensor([3.0, -2.0])
    rule = GrowingRule(every=10, voxel=1.0, gradient=1.0)
    came = 0
    for _ in range(40):  # the choice is random
        growing = grown(rule, {(0, 1): pull, (1, 0): 0.9}, made)
        came += growing.change(made)[0]
        assert len(growing.seen) == len(made) and len(growing.drawn) == len(made)
    assert came == len(expected) and set(made.positions[2:, 0].tolist()) == expected
    for place, feature, scale in zip(made.positions[2:], made.features[2:], made.log_scales[2:], strict=True):
        assert feature.tolist() == [3.0, -2.0] and bool((place[1:] == 0).all())
        torch.testing.assert_close(scale.exp(), torch.full((6,), 4.0 if float(place[0]) == 4 else 1.0))


def test_anchors_that_stay_clear_are_removed_with_their_state():
    made = anchors(6)
    optimizer = torch.optim.Adam([{"params": [made.features]}, {"params": [made.offsets]}], lr=0.1)
    (made.features.sum() + made.offsets.square().sum()).backward()
    optimizer.step()
    before, moments = made.features.detach().clone(), optimizer.state[made.features]["exp_avg"].clone()
    growing = grown(GrowingRule(every=10, voxel=0.1, gradient=1e9), {}, made)
    growing.opacity[[1, 4]] = 0.01
    growing.opacity[2], growing.seen[2] = 0.0, 3  # not seen often enough to be judged
    assert growing.change(made, optimizer) == (0, 2)
    kept = [0, 2, 3, 5]
    assert torch.equal(made.features, before[kept]) and len(made.positions) == 4
    assert torch.equal(optimizer.state[made.features]["exp_avg"], moments[kept])
    assert optimizer.param_groups[0]["params"][0] is made.features
    assert growing.seen.tolist() == [0, 3, 0, 0]
    made.features.sum().backward()
    optimizer.step()  # goes on
    assert float(optimizer.state[made.features]["step"]) == 2


def test_a_scene_is_never_emptied():
    made = anchors(3)
    growing = grown(GrowingRule(every=10, voxel=0.1, gradient=1e9), {}, made)
    growing.opacity.zero_()
    assert growing.change(made) == (0, 0) and len(made) == 3


def test_rows_that_are_new_have_no_running_means():
    made = anchors(3)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.1)
    sum(p.sum() for p in made.parameters()).backward()
    optimizer.step()
    added = {
        name: torch.full_like(value[:2], 7.0)
        for name, value in {**dict(made.named_parameters()), **dict(made.named_buffers())}.items()
    }
    change_rows(made, torch.tensor([2, 0]), added, optimizer)
    assert len(made) == 4 and float(made.positions[3, 0]) == 7
    means = optimizer.state[made.offsets]["exp_avg"]
    assert bool((means[2:] == 0).all()) and bool((means[:2] != 0).all())
    set_rows(optimizer, made.offsets, torch.ones(1, 3, 3), torch.tensor([0]))
    assert bool((means[0] == 0).all()) and float(made.offsets[0].sum()) == 9


def test_bad_input_is_named():
    made = anchors()
    with pytest.raises(InputError, match=r"N anchors are"):
        Anchors(made.positions, made.features, made.offsets[:3], made.log_scales)
    with pytest.raises(InputError, match="NaN"):
        Anchors.from_points(torch.full((3, 3), math.nan))
    with pytest.raises(InputError, match=r"points must be \(N, 3\)"):
        Anchors.from_points(torch.zeros(0, 3))
    with pytest.raises(InputError, match="a decoder of that size"):
        AnchorScene(made, AnchorDecoder(5, 4))
    with pytest.raises(InputError, match="sizes of 1 or more"):
        AnchorDecoder(0)
    with pytest.raises(InputError, match="call backward"):
        view = view_of(VIEWS, 0)
        picture_gradients(draw_anchors(made, AnchorDecoder(5, 3), view).splat, view)
