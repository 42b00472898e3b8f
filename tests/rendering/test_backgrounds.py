from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from limbeck.core.errors import InputError
from limbeck.rendering.backgrounds import BackgroundNetwork, over, random_per_image, random_per_ray
from limbeck.rendering.cameras import orbit
from limbeck.rendering.fields import build_field
from limbeck.rendering.fields.encodings import frequency_encoding
from limbeck.rendering.volume import render_image, render_rays

torch.set_num_threads(1)


def test_the_network_by_hand_and_behind_a_field():
    torch.manual_seed(0)
    network, field = BackgroundNetwork(), build_field("voxels", {"resolution": 4})
    d = F.normalize(torch.randn(6, 3), dim=-1)
    first, second, last = (m for m in network.net if isinstance(m, torch.nn.Linear))
    assert (first.in_features, second.in_features, last.in_features, last.out_features) == (27, 16, 16, 3)
    by_hand = last(second(first(frequency_encoding(d, 4)).relu()).relu()).sigmoid()
    torch.testing.assert_close(network(d), by_hand)
    camera = orbit([20.0], 10.0, 3.0, 90.0, 6, 6)
    found = render_image(field, camera, background=network, samples=8)
    free = found["opacity"] == 0
    assert bool(free.any())
    torch.testing.assert_close(found["rgb"][free], network(camera.rays(0).directions)[free.flatten()])
    found["rgb"].sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in network.parameters())


def test_a_network_gives_way_now_and_then():
    network, d = BackgroundNetwork(swap=0.5), F.normalize(torch.randn(6, 3), dim=-1)
    torch.manual_seed(3)
    calls = [network(d) for _ in range(60)]
    random = [bool((c == c[:1]).all()) for c in calls]
    assert 15 < sum(random) < 45
    torch.manual_seed(3)
    assert all(a.equal(network(d)) for a in calls), "the global random state decides"
    network.eval()
    assert network(d).equal(network(d)) and not bool((network(d) == network(d)[:1]).all())


def test_random_colours():
    ids = torch.tensor([7, 3, 7, 3, 3, -1])
    torch.manual_seed(0)
    found = random_per_image(ids)
    assert found[0].equal(found[2]) and found[1].equal(found[4]) and len(torch.unique(found, dim=0)) == 3
    torch.manual_seed(0)
    assert random_per_image(ids).equal(found)
    each = random_per_ray(200)
    assert (
        each.shape == (200, 3)
        and len(torch.unique(each, dim=0)) == 200
        and 0 <= float(each.min()) <= float(each.max()) < 1
    )
    field, rays = build_field("voxels", {"resolution": 4}), orbit([0.0], 0.0, 3.0, 90.0, 20, 10).rays(0)
    rendered = render_rays(field, rays, samples=4, background=each)
    free = rendered["opacity"] == 0
    torch.testing.assert_close(rendered["rgb"][free], each[free])


def test_pictures_change_their_background():
    rgb, alpha = torch.rand(5, 4, 3), torch.rand(5, 4)
    white, colours = over(rgb, alpha, 1.0), torch.rand(5, 4, 3)
    torch.testing.assert_close(white, rgb * alpha[..., None] + 1 - alpha[..., None])
    torch.testing.assert_close(over(white, alpha, colours, previous=1.0), over(rgb, alpha, colours))


def test_bad_input_is_named():
    with pytest.raises(InputError, match="chance of a random background"):
        BackgroundNetwork(swap=2.0)
    with pytest.raises(InputError, match="hidden is a whole number"):
        BackgroundNetwork(hidden=0)
    with pytest.raises(InputError, match="alpha of colours"):
        over(torch.rand(2, 3), torch.rand(3), 1.0)
