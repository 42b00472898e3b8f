from __future__ import annotations

import pytest
import torch

from limbeck.core.errors import InputError
from limbeck.rendering.cameras import Cameras, orbit
from limbeck.rendering.ray_sampler import RayBatch, RaySampler
from limbeck.rendering.rays import intersect_box

torch.set_num_threads(1)


def some(n: int = 3) -> Cameras:
    return orbit([120.0 * i for i in range(n)], 20.0, 3.0, 50.0, 6, 4)


def pictures(n: int = 3) -> torch.Tensor:
    return torch.rand(n, 4, 6, 3, generator=torch.Generator().manual_seed(0))


def check(batch: RayBatch, cameras: Cameras, images: torch.Tensor | None) -> None:
    """Rays and colours are those of the pixels named."""
    again = cameras.rays(batch.ids, batch.pixels)
    torch.testing.assert_close(batch.rays.origins, again.origins)
    torch.testing.assert_close(batch.rays.directions, again.directions)
    if images is not None:
        assert batch.colours is not None
        torch.testing.assert_close(batch.colours, images[batch.ids, batch.pixels[:, 1], batch.pixels[:, 0]])


def test_uniform_over_all_pixels():
    torch.manual_seed(0)
    cameras, images = some(), pictures()
    batch = RaySampler(cameras, images, 20_000).draw()
    check(batch, cameras, images)
    flat = (batch.ids * 4 + batch.pixels[:, 1]) * 6 + batch.pixels[:, 0]
    counts = torch.bincount(flat, minlength=72).double()
    expected = 20_000 / 72
    assert float(((counts - expected) ** 2 / expected).sum()) < 71 + 4 * (2 * 71) ** 0.5  # chi squared, 71 degrees
    assert batch.fresh == len(batch) == 20_000 and batch.alpha is None
    assert RaySampler(cameras, rays=5).draw().colours is None
    eight = RaySampler(cameras, (images * 255).byte(), 9).draw()
    check(eight, cameras, (images * 255).byte().float() / 255)


def test_the_global_random_state_decides():
    sampler = RaySampler(some(), pictures(), 50)
    torch.manual_seed(1)
    first, second = sampler.draw(), sampler.draw()
    torch.manual_seed(1)
    again = sampler.draw()
    assert again.pixels.equal(first.pixels) and again.ids.equal(first.ids) and not second.pixels.equal(first.pixels)


@pytest.mark.parametrize("by", ["alpha", "box"])
def test_foreground(by: str):
    torch.manual_seed(0)
    cameras, alpha = some(), torch.zeros(3, 4, 6)
    alpha[0, 1, 2], alpha[2, :, 5] = 0.5, 1.0
    box = torch.tensor([[-0.5] * 3, [0.5] * 3])
    given = {"alpha": alpha} if by == "alpha" else {"aabb": box}
    for share in (1.0, 0.5):
        sampler = RaySampler(cameras, None, 4000, "foreground", share=share, **given)
        batch = sampler.draw()
        check(batch, cameras, None)
        if by == "alpha":
            assert batch.alpha is not None
            torch.testing.assert_close(batch.alpha, alpha[batch.ids, batch.pixels[:, 1], batch.pixels[:, 0]])
            seen, everywhere = batch.alpha > 0, 5 / 72
        else:
            seen = intersect_box(batch.rays, box, cameras.near, cameras.far)[2]
            everywhere = sum(float(intersect_box(cameras.rays(i), box)[2].sum()) for i in range(3)) / 72
        assert 0 < everywhere < 0.5
        assert float(seen.double().mean()) == pytest.approx(share + (1 - share) * everywhere, abs=0.03)


def test_one_camera_at_a_time():
    cameras, alpha = some(), torch.zeros(3, 4, 6)
    alpha[0, 1, 2] = 1.0
    for sampler in (
        RaySampler(cameras, rays=200),
        RaySampler(cameras, rays=200, strategy="foreground", alpha=alpha, share=1.0),
    ):
        for camera in range(3):
            batch = sampler.draw(camera)
            assert batch.ids.tolist() == [camera] * 200
            check(batch, cameras, None)
            only = sampler.strategy == "foreground" and camera == 0
            assert len(torch.unique(batch.pixels, dim=0)) == (1 if only else 24), (
                "a picture without foreground is drawn uniformly"
            )


def distance(batch: RayBatch) -> torch.Tensor:
    """An error that grows to the right and downwards."""
    return (batch.pixels[:, 0] + 10 * batch.pixels[:, 1]).float()


def test_the_pool_keeps_the_worst_until_they_were_shown_again():
    torch.manual_seed(0)
    cameras, images = some(), pictures()
    sampler = RaySampler(cameras, images, 40, "hard-pool", ratio=0.1, capacity=10)
    pool = sampler.pool
    assert pool is not None
    for step in range(3):
        batch = sampler.draw()
        assert len(batch) == 40 and not len(batch.slots)
        sampler.update(batch, distance(batch))
        worst = distance(batch).topk(4).values[: 4 if step < 2 else 2]  # the third time there is room for two
        torch.testing.assert_close(
            pool.values[4 * step : 4 * step + 4, 6] + 10 * pool.values[4 * step : 4 * step + 4, 7], worst
        )
    assert pool.full
    batch = sampler.draw()
    check(batch, cameras, images)
    assert len(batch) == 44 and batch.fresh == 40 and len(set(batch.slots.tolist())) == 4
    before, errors = pool.values.clone(), distance(batch)
    assert float(errors[40:].mean()) > 1.5 * float(errors[:40].mean()), "hard rays are worse than the others"
    sampler.update(batch, errors)
    kept = torch.ones(10, dtype=torch.bool)
    kept[batch.slots] = False
    assert pool.values[kept].equal(before[kept])
    torch.testing.assert_close(
        pool.values[batch.slots, 6] + 10 * pool.values[batch.slots, 7], errors[:40].topk(4).values
    )


def test_the_pool_outlives_its_cameras():
    sampler = RaySampler(some(), pictures(), 40, "hard-pool", capacity=4)
    first = sampler.draw()
    sampler.update(first, distance(first))
    new = orbit([10.0, 20.0], 50.0, 5.0, 50.0, 6, 4)
    with pytest.raises(InputError, match="colours or none"):
        sampler.use(new)
    sampler.use(new, pictures(2))
    batch = sampler.draw()
    assert batch.ids[40:].tolist() == [-1] * 4
    worst = distance(first).topk(4).indices
    assert {tuple(o) for o in batch.rays.origins[40:].tolist()} == {
        tuple(o) for o in first.rays.origins[worst].tolist()
    }
    assert batch.colours is not None and first.colours is not None
    assert {tuple(c) for c in batch.colours[40:].tolist()} == {tuple(c) for c in first.colours[worst].tolist()}


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_resuming_exactly(stop: int):
    """The state and torch's random state together continue the same rays."""

    def run(sampler: RaySampler, steps: int) -> list[torch.Tensor]:
        found = []
        for _ in range(steps):
            batch = sampler.draw()
            sampler.update(batch, distance(batch) + torch.rand(len(batch)))
            found.append(torch.cat([batch.rays.origins, batch.rays.directions], 1))
        return found

    def make() -> RaySampler:
        return RaySampler(some(), pictures(), 40, "hard-pool", alpha=torch.rand(3, 4, 6), capacity=10)

    torch.manual_seed(0)
    whole = run(sampler := make(), 8)
    torch.manual_seed(0)
    sampler = make()
    run(sampler, stop)
    state, random = sampler.state_dict(), torch.get_rng_state()
    run(sampler, 1)  # what was saved does not follow
    again = make()
    again.load_state_dict(state)
    torch.set_rng_state(random)
    for a, b in zip(run(again, 8 - stop), whole[stop:], strict=True):
        assert a.equal(b)


def test_bad_input_is_named():
    cameras, images = some(), pictures()
    for arguments, told in (
        ({"strategy": "hard"}, "uniform, foreground or hard-pool, not 'hard'"),
        ({"rays": 0}, "at least 1"),
        ({"ratio": 0.0}, "ratio in"),
        ({"capacity": 0}, "at least 1"),
        ({"share": 1.5}, "share in"),
        ({"strategy": "foreground"}, "give alpha or aabb"),
        ({"images": images[:2]}, r"images of these cameras are \(3, 4, 6, 3\)"),
        ({"alpha": images}, r"alpha of these cameras are \(3, 4, 6\)"),
    ):
        with pytest.raises(InputError, match=told):
            RaySampler(cameras, **arguments)
    sampler = RaySampler(cameras, images, 40, "hard-pool", capacity=10)
    batch = sampler.draw()
    with pytest.raises(InputError, match="needs as many errors"):
        sampler.update(batch, torch.zeros(3))
    with pytest.raises(InputError, match="the training has diverged"):
        sampler.update(batch, torch.full((40,), torch.nan))
    with pytest.raises(InputError, match="0 to 2"):
        sampler.draw(3)
    sampler.update(batch, distance(batch))
    for other in (
        RaySampler(cameras, images, 40),
        RaySampler(cameras, None, 40, "hard-pool", capacity=10),
        RaySampler(cameras, images, 40, "hard-pool", capacity=2),
    ):
        with pytest.raises(InputError, match="same settings"):
            other.load_state_dict(sampler.state_dict())
