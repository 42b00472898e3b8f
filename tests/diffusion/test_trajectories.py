"""Guided trajectories: what is recorded is what the sampler did, stores keep it exactly, and half precision says when it cannot."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from limbeck.core.data import Stream
from limbeck.core.errors import InputError, RunError
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.oracles import gaussian_mixture
from limbeck.diffusion.predictions import convert
from limbeck.diffusion.schedules import EDM, Flow, VPCosine, VPDiscrete
from limbeck.diffusion.solvers import ddim_step, ode_solve
from limbeck.diffusion.trajectories import (
    Recorded,
    TrajectoryData,
    TrajectoryStore,
    record_diffused,
    record_guided,
)
from limbeck.networks.diffusion_mlp import DiffusionMLP

torch.set_num_threads(1)


def network_teacher(schedule=None, prediction: str = "v") -> Denoiser:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    module = DiffusionMLP((2,), width=8, blocks=1, num_classes=3, time_features=4)
    torch.nn.init.normal_(module.last.weight)
    return Denoiser(module.eval(), schedule or VPCosine(), prediction, null_cond=torch.tensor(3))


C = torch.arange(6) % 3
W = torch.tensor([1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


@pytest.mark.parametrize(
    ("schedule", "prediction"), [(VPCosine(), "v"), (Flow(), "flow"), (VPDiscrete(), "eps"), (EDM(0.02, 20.0), "x0")]
)
def test_one_entry_for_each_step_and_the_next_state_is_the_samplers(schedule, prediction):
    teacher = network_teacher(schedule, prediction)
    x = torch.randn(6, 2) * schedule.prior_std
    times = schedule.times(5)
    found = record_guided(teacher, x, times, C, W)
    assert found.states.shape == found.predictions.shape == (5, 6, 2)
    solved = ode_solve(teacher, x, times, cond=C, guidance=W, record=True)
    torch.testing.assert_close(torch.cat([found.states, found.end[None]]), solved.states)
    for k in range(5):
        # Guidance by its equation, from separate calls, in the form that the network predicts.
        with torch.no_grad():
            now = schedule.to_model_time(times[k].float().expand(6))
            conditional = teacher.module(found.states[k], now, C)
            blank = teacher.module(found.states[k], now, torch.full((6,), 3))
        torch.testing.assert_close(found.predictions[k], blank + W[:, None] * (conditional - blank))
        x0 = convert(found.predictions[k], prediction, "x0", found.states[k], times[k].float().expand(6), schedule)
        after = ddim_step(found.states[k], x0, times[k], times[k + 1], schedule)
        torch.testing.assert_close(after, found.end if k == 4 else found.states[k + 1])


def test_teacher_is_asked_twice_a_step_and_once_without_guidance():
    teacher = network_teacher()
    record_guided(teacher, torch.randn(6, 2), teacher.schedule.times(5), C, W)
    assert teacher.evaluations == 10
    record_guided(teacher, torch.randn(6, 2), teacher.schedule.times(5), C, 1.0)
    assert teacher.evaluations == 15


def test_guided_states_leave_the_law_of_noised_data_as_w_grows():
    # One class is two far modes; guidance away from all classes pushes trajectories outwards.
    means = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0], [-2.0, 0.0]])
    law = gaussian_mixture(means, 0.2, labels=torch.tensor([0, 0, 1, 1]), schedule=Flow())
    x0, labels = law.sample(400, torch.Generator().manual_seed(0))
    times = law.schedule.times(8)
    noised = record_diffused(law, x0, times, labels, 5.0, torch.Generator().manual_seed(1)).states
    z = torch.randn(400, 2, generator=torch.Generator().manual_seed(2))
    gaps = []
    for w in (1.0, 5.0):
        ran = record_guided(law, z, times, labels, w).states
        assert torch.equal(ran[0], z)
        gaps.append(float((ran[-1].abs().mean(0) - noised[-1].abs().mean(0)).abs()[0]))
    assert gaps[1] > 3 * gaps[0]


def test_diffused_states_are_noised_data_with_fresh_noise_at_each_time():
    teacher = network_teacher(Flow(), "flow")
    x0 = torch.randn(6, 2)
    times = teacher.schedule.times(4)
    found = record_diffused(teacher, x0, times, C, W, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    for k, t in enumerate(times[:-1].float().tolist()):
        noise = torch.randn(6, 2, generator=generator)
        torch.testing.assert_close(found.states[k], (1 - t) * x0 + t * noise)
        expected = teacher.predict(found.states[k], t, C, "flow", W)
        torch.testing.assert_close(found.predictions[k], expected.detach())
    assert found.end is None and not torch.equal(found.states[1] - found.states[0], found.states[2] - found.states[1])


def filled(folder=None, half: bool = False, cond=C) -> tuple[TrajectoryStore, Recorded]:  # type: ignore[no-untyped-def]
    teacher = network_teacher()
    times = teacher.schedule.times(4)
    recorded = record_guided(teacher, torch.randn(6, 2, generator=torch.Generator().manual_seed(5)), times, C, W)
    store = TrajectoryStore(6, times, (2,), folder, half)
    for start in (0, 4):
        part = slice(start, min(start + 4, 6))
        piece = Recorded(recorded.states[:, part], recorded.predictions[:, part], None)
        own = {k: v[part] for k, v in cond.items()} if isinstance(cond, dict) else cond[part]
        store.write(start, piece, own, W[part])
    return store, recorded


@pytest.mark.parametrize("where", ["memory", "folder"])
@pytest.mark.parametrize("half", [False, True])
def test_a_store_gives_back_what_was_recorded(where, half, tmp_path):
    store, recorded = filled(None if where == "memory" else tmp_path / "store", half)
    ids = torch.tensor([0, 3, 4, 23, 9])
    found = store.batch(ids)
    row, step = ids // 4, ids % 4
    kind = torch.float16 if half else torch.float32
    assert torch.equal(found["x_t"], recorded.states[step, row].to(kind).float())
    assert torch.equal(found["prediction"], recorded.predictions[step, row].to(kind).float())
    assert torch.equal(found["t"], store.times[step].float()) and found["t"][0] == 1.0
    assert torch.equal(found["w"], W[row]) and torch.equal(found["cond"], C[row])
    assert len(store) == 24 and store.done == 6 and store.nbytes == 2 * 24 * 2 * (2 if half else 4)


def test_stored_prediction_equals_guidance_computed_again():
    store, _ = filled()
    teacher = network_teacher()
    found = store.batch(torch.arange(24))
    again = teacher.predict(found["x_t"], found["t"], found["cond"], "v", found["w"]).detach()
    torch.testing.assert_close(again, found["prediction"])


def test_draws_are_even_over_trajectories_and_steps():
    store, _ = filled()
    found = store.draw(4000, torch.Generator().manual_seed(0))
    counts = torch.stack([(found["w"][:, None] == W).float().mean(0)])
    assert (counts - 1 / 6).abs().max() < 0.03
    assert ((found["t"][:, None] == store.times[:-1].float()).float().mean(0) - 1 / 4).abs().max() < 0.03


def test_state_goes_round_and_in_a_folder_only_what_is_small(tmp_path):
    store, _ = filled()
    other = TrajectoryStore(6, store.times, (2,))
    other.load_state_dict(store.state_dict())
    kept, _ = filled(tmp_path / "a")
    assert "states" not in kept.state_dict()
    again = TrajectoryStore(6, store.times, (2,), tmp_path / "a")  # opens the files that are there
    again.load_state_dict(kept.state_dict())
    for made in (other, again):
        for key, value in store.batch(torch.arange(24)).items():
            assert torch.equal(made.batch(torch.arange(24))[key], value)
    with pytest.raises(RunError, match=r"holds \(6, 4, 2\) of float32, not \(7, 4, 2\)"):
        TrajectoryStore(7, store.times, (2,), tmp_path / "a")
    np.save(tmp_path / "a" / "states.npy", np.array(["x"], dtype=object), allow_pickle=True)
    with pytest.raises(RunError, match="is not a stored array"):
        TrajectoryStore(6, store.times, (2,), tmp_path / "a")


def test_conditions_may_be_mappings_or_none():
    cond = {"text": torch.randn(6, 3, 4), "pooled": torch.randn(6, 2)}
    store, _ = filled(cond=cond)
    found = store.batch(torch.tensor([22]))["cond"]
    assert torch.equal(found["text"], cond["text"][5:]) and torch.equal(found["pooled"], cond["pooled"][5:])
    teacher = network_teacher()
    alone = TrajectoryStore(6, teacher.schedule.times(4), (2,))
    alone.write(0, filled()[1], None, 1.0)
    assert "cond" not in alone.batch(torch.tensor([0]))


def test_as_data_every_state_comes_once_an_epoch():
    store, _ = filled()
    stream = Stream(TrajectoryData(store), 8, seed=0)
    batches = [stream.batch(k).inputs for k in range(3)]
    seen = torch.cat([b["x_t"] for b in batches])
    every = store.batch(torch.arange(24))["x_t"]
    assert torch.equal(seen.sort(0).values, every.sort(0).values) and not torch.equal(seen, every)


def test_what_does_not_fit_is_refused():
    store, recorded = filled()
    with pytest.raises(InputError, match="do not fit into a store of 6 of 4"):
        store.write(3, recorded, C, W)
    with pytest.raises(InputError, match="do not fit into a store of 6 of 3"):
        TrajectoryStore(6, store.times[1:], (2,)).write(0, recorded, C, W)
    empty = TrajectoryStore(6, store.times, (2,))
    with pytest.raises(InputError, match="trajectory 5 was not recorded yet: there are 0"):
        empty.batch(torch.tensor([21]))
    large = Recorded(recorded.states, recorded.predictions * 1e6, None)
    with pytest.raises(RunError, match="predictions of a guided trajectory do not fit into 16 bits"):
        TrajectoryStore(6, store.times, (2,), half=True).write(0, large, C, W)
    empty.write(0, large, C, W)  # but into 32
    with pytest.raises(RunError, match="states of a guided trajectory hold NaN"):
        empty.write(0, Recorded(recorded.states * torch.nan, recorded.predictions, None), C, W)
    with pytest.raises(InputError, match="needs a trajectory and two times"):
        TrajectoryStore(0, store.times, (2,))
