from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.core.errors import InputError, RunError
from limbeck.diffusion.conditions import Conditions
from limbeck.diffusion.oracles import gaussian_mixture
from limbeck.diffusion.pairs import PairData, PairStore, noise_of, straightness
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.schedules import EDM, Flow

torch.set_num_threads(1)

MEANS = torch.tensor([[-1.0, 0.5], [1.0, -0.5]])
CONDITIONS = Conditions(torch.tensor([0, 1]))


def sampler() -> Sampler:
    return Sampler.ode(gaussian_mixture(MEANS, 0.2, labels=torch.tensor([0, 1]), schedule=Flow()), 4)


def store(folder: Path | None, **options) -> PairStore:
    return PairStore(10, (2,), folder, **options)


@pytest.fixture(params=["memory", "folder"])
def where(request, tmp_path: Path) -> Path | None:
    return None if request.param == "memory" else tmp_path / "pairs"


def test_pairs_are_what_the_sampler_makes_of_the_noise(where: Path | None):
    pairs = store(where)
    assert len(pairs) == 0
    for start in (0, 4, 8):
        pairs.fill(sampler(), CONDITIONS, start, 4, seed=3)
    assert len(pairs) == pairs.done == 10
    z, x, cond = pairs.batch(torch.tensor([9, 0, 5]))
    assert torch.equal(z[1], noise_of(3, 0, 4, (2,))[0]) and torch.equal(z[2], noise_of(3, 4, 4, (2,))[1])
    torch.testing.assert_close(sampler().sample(z, cond).x, x, rtol=1e-5, atol=1e-5)
    assert cond.dtype == torch.int64 and set(pairs.batch(torch.arange(10))[2].tolist()) == {0, 1}
    z, x, _ = pairs.batch(torch.arange(10))
    assert pairs.transport_cost() == pytest.approx(float((z - x).square().mean()))


def test_a_store_does_not_depend_on_when_it_was_filled(where: Path | None):
    """Each chunk is a function of the seed and its place; an interrupted store goes on to the same pairs."""
    whole = store(None)
    for start in (0, 4, 8):
        whole.fill(sampler(), CONDITIONS, start, 4, seed=3)
    part = store(where)
    part.fill(sampler(), CONDITIONS, 0, 4, seed=3)
    kept = copy.deepcopy(part.state_dict())
    assert ("z" in kept) == (where is None)
    again = store(where)
    again.load_state_dict(kept)
    assert len(again) == 4
    torch.randn(3)  # torch's own state has no part in it
    for start in (4, 8):
        again.fill(sampler(), CONDITIONS, start, 4, seed=3)
    for a, b in zip(whole.batch(torch.arange(10)), again.batch(torch.arange(10)), strict=True):
        assert torch.equal(a, b)
    other = store(None)
    other.fill(sampler(), CONDITIONS, 0, 4, seed=4)
    assert not torch.equal(other.z[:4], whole.z[:4])


def test_files_in_a_folder(tmp_path: Path):
    pairs = store(tmp_path)
    pairs.fill(sampler(), CONDITIONS, 0, 10, seed=0)
    on_disk = np.load(tmp_path / "x.npy", mmap_mode="r")
    np.testing.assert_array_equal(on_disk, pairs.batch(torch.arange(10))[1].numpy())
    with pytest.raises(RunError, match="another folder"):
        PairStore(11, (2,), tmp_path)
    with pytest.raises(RunError, match="another folder"):
        PairStore(10, (2,), tmp_path, half=True)
    (tmp_path / "z.npy").write_bytes(b"nothing")
    with pytest.raises(RunError, match="not a store"):
        store(tmp_path)


def test_sixteen_bits_and_mappings_of_conditions(where: Path | None):
    pairs = store(where, half=True)
    z, x = torch.randn(3, 2), torch.randn(3, 2)
    cond = {"text": torch.randn(3, 4), "size": torch.arange(3)}
    pairs.write(0, z, x, cond)
    found = pairs.batch(torch.tensor([2, 1]))
    assert found[0].dtype == torch.float32 and torch.equal(found[0], z[[2, 1]].half().float())
    assert torch.equal(found[2]["text"], cond["text"][[2, 1]]) and found[2]["size"].tolist() == [2, 1]


def test_as_a_data_set():
    pairs = store(None)
    data = PairData(pairs)
    assert len(data) == 10 and not data.augmented  # its size is known before it is filled
    pairs.fill(sampler(), CONDITIONS, 0, 10, seed=0)
    batch = data.fetch(torch.tensor([1, 3]), None)
    assert torch.equal(batch.inputs["x0"], pairs.batch(torch.tensor([1, 3]))[1])
    assert set(batch.inputs) == {"x0", "z", "cond"}
    plain = store(None)
    plain.fill(sampler(), Conditions(None, 5), 0, 10, seed=0)
    assert set(PairData(plain).fetch(torch.tensor([0]), None).inputs) == {"x0", "z"}


def test_bad_input_is_named(where: Path | None):
    with pytest.raises(InputError, match="at least one pair"):
        PairStore(0, (2,))
    pairs = store(where)
    with pytest.raises(InputError, match="not made yet"):
        pairs.batch(torch.tensor([0]))
    with pytest.raises(RunError, match="NaN or infinity"):
        pairs.write(0, torch.zeros(1, 2), torch.full((1, 2), torch.nan))


def test_straight_paths_are_straight_and_bent_ones_are_not() -> None:
    z = torch.randn(400, 2)
    point = gaussian_mixture(torch.tensor([[2.0, -1.0]]), 0.0)  # every path is the straight line to the one point
    assert straightness(Sampler.ode(point, 20, "euler"), z) < 1e-8
    two = gaussian_mixture(torch.tensor([[2.0, 0.0], [-2.0, 0.0]]), 0.05)
    assert straightness(Sampler.ode(two, 20, "euler"), z) > 0.05
    with pytest.raises(InputError, match="schedule 'flow'"):
        straightness(Sampler.ode(gaussian_mixture(torch.zeros(1, 2), 0.1, schedule=EDM()), 4), z)
