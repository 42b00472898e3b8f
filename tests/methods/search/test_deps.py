"""DepS: the step's loss against sums by hand, the ramp, sorting at the switch, rivals, resume, cut-out students, bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import limbeck
from limbeck.blocks.channel_sorting import channel_importance
from limbeck.core.data import TensorData
from limbeck.core.engine import Engine, EngineConfig
from limbeck.core.errors import InputError
from limbeck.methods.search import DepS
from limbeck.networks import build
from limbeck.networks.supernets import Knob, SuperNetwork
from tests.helpers import resumed_equals_uninterrupted

QUIET = EngineConfig(progress=False)


def supernet(seed: int = 0) -> SuperNetwork:
    torch.manual_seed(seed)
    net = build("elasticmlp-d8-m16-l2", in_shape=(6,), num_classes=3)
    assert isinstance(net, SuperNetwork)
    return net


def data(count: int = 96) -> TensorData:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 3
    return TensorData(torch.randn(count, 6, generator=generator) + 2 * F.one_hot(y, 6), y)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    found = data(24).fetch(torch.arange(24), None)
    return found.inputs, found.labels


def gradients(net: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def test_a_step_of_shrinking_is_the_sum_of_its_networks_losses():
    """Full network on labels; the others on its detached, softened output; one gradient of the weighted sum."""
    net = supernet()
    method = DepS(net, steps=40, temperature=2.0, multiplier=0.5, networks=5)
    method.steps_done.fill_(30)
    x, y = batch()
    codes = method.codes(30)
    assert list(codes) == ["full", "smallest", "random1", "random2", "random3"]
    assert codes["full"] == net.largest and codes["smallest"] == net.smallest
    losses = method.losses(limbeck.core.batch.Batch(x, y))
    losses.total.backward()
    found = gradients(net)
    net.zero_grad()
    full = net(x)
    expected = -(0.9 * F.one_hot(y, 3) + 0.1 / 3).mul(full.log_softmax(1)).sum(1).mean()
    assert losses["ce"].item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    p = torch.softmax(full.detach() / 2, 1)
    for role, code in list(codes.items())[1:]:
        net.set_active(code)
        loss = -(p * (net(x) / 2).log_softmax(1)).sum(1).mean()
        assert losses[f"kd_{role}"].item() == pytest.approx(loss.item(), rel=1e-5)
        (0.5 * 4 * loss).backward()
    for name, gradient in gradients(net).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    assert method.counters["network_passes"] == 5 * 24
    costs = [net.costs(code)["flops"] for code in codes.values()]
    assert method.counters["forward_flops"] == 24 * sum(costs)


def test_sub_networks_wait_and_then_ramp():
    method = DepS(supernet(), steps=24, start=0.5, ramp=0.25, lr=0.1)
    x, y = batch()
    optimizer = torch.optim.SGD(method.supernet.parameters(), lr=0.1)
    method.watch(optimizer)
    seen = []
    for step in range(24):
        losses = method.losses(limbeck.core.batch.Batch(x, y))
        seen.append((set(losses), losses.weights.get("kd_smallest", 0.0)))
        if step < 6:
            losses.total.backward()  # nothing outside of the full network's loss
        method(limbeck.core.batch.Batch(x, y))
    assert all(names == {"ce"} for names, _ in seen[:7])  # the ramp begins at 0
    assert all(names == {"ce", "kd_smallest", "kd_random1", "kd_random2"} for names, _ in seen[7:])
    rate = method.rate
    for step in range(6, 12):
        assert seen[step][1] * rate(step) == pytest.approx(rate(12) * (step - 6) / 6)
    assert all(weight == 1.0 for _, weight in seen[12:])


def test_draws_follow_from_seed_and_step_alone():
    methods = [DepS(supernet(seed), steps=40) for seed in (0, 1)]
    torch.rand(5)
    drawn = [[m.codes(step) for step in range(20, 40)] for m in methods]
    assert drawn[0] == drawn[1]
    assert len({tuple(codes["random1"]) for codes in drawn[0]}) > 5
    methods[1].seed = 7
    assert drawn[0] != [methods[1].codes(step) for step in range(20, 40)]


def test_channels_are_sorted_once_when_shrinking_begins_and_momentum_moves():
    method = DepS(supernet(), steps=20, ramp=0.0)
    fc2 = method.supernet.network.blocks[0].fc2
    optimizer = torch.optim.SGD(method.supernet.parameters(), lr=0.1, momentum=0.9)
    method.watch(optimizer)
    for step in range(12):
        if step == 10:
            with torch.no_grad():
                x = batch()[0]
                method.eval()
                before, momentum = method.supernet(x), optimizer.state[fc2.weight]["momentum_buffer"].clone()
                method.train()
        loss = method(batch())
        if step == 10:
            found = channel_importance(fc2)
            assert torch.equal(found, found.sort(descending=True).values)
            moved = optimizer.state[fc2.weight]["momentum_buffer"]
            assert not torch.equal(moved, momentum)
            torch.testing.assert_close(moved.abs().sum(0).sort().values, momentum.abs().sum(0).sort().values)
            assert before.shape == (24, 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = channel_importance(fc2)
    assert not torch.equal(found, found.sort(descending=True).values)  # trained on, not sorted again


def test_presets_are_what_their_papers_train():
    net = supernet()
    bignas = DepS(net, DepS.Config.make("bignas", steps=20))
    assert bignas.plan.begins == bignas.plan.full_speed == 0 and bignas.plan.passes == 80
    x = limbeck.core.batch.Batch(*batch())
    assert set(bignas.losses(x)) == {"ce", "kd_smallest", "kd_random1", "kd_random2"}
    slimmable = DepS(supernet(), DepS.Config.make("slimmable", steps=20))
    losses = slimmable.losses(x)
    assert set(losses) == {"ce", "ce_smallest", "ce_random1", "ce_random2"}
    net = slimmable.supernet
    net.set_active(net.smallest)
    own = F.cross_entropy(net(x.inputs), x.labels, label_smoothing=0.1)
    assert losses["ce_smallest"].item() == pytest.approx(own.item(), rel=1e-5)
    compofa = DepS(supernet(), DepS.Config.make("compofa", steps=20))
    compofa.steps_done.fill_(15)
    assert {"kd_smallest", "ce_smallest"} <= set(compofa.losses(x))
    assert len({compofa.codes(step)["random1"] for step in range(10, 20)}) == 2


def test_progressive_shrinking_runs_its_phases_against_a_frozen_teacher():
    method = DepS(supernet(), DepS.Config.make("ofa", steps=30, batch_size=16, evaluations=0, search=0, networks=2))
    stages = method.stages(data())
    assert [s.name for s in stages] == ["training full", *(f"training {p.name}" for p in method.plan.phases)]
    assert [p.name for p in method.plan.phases] == ["depth 1", "width 1", "width 2", "width 3"]
    assert sum(s.steps for s in stages) == 30
    frozen = {}

    def after(step: int, then=stages[1].after_step) -> None:
        if not frozen:
            frozen.update({n: p.clone() for n, p in method.teacher.state_dict().items()})
        then(step)

    stages[1].after_step = after
    Engine(None, QUIET, seed=0).run(method, stages)
    assert int(method.steps_done) == 30
    for name, tensor in method.teacher.state_dict().items():
        assert torch.equal(tensor, frozen[name]), name
    changed = method.supernet.state_dict()
    assert not torch.equal(frozen["network.head.weight"], changed["network.head.weight"])
    depth = method.plan.phases[0]
    codes = [c for step in range(depth.first, depth.end) for c in method.codes(step).values()]
    assert {c[1:] for c in codes} == {(3, 3)}  # only the depth is open


@pytest.mark.parametrize("preset", ["small", "ofa"])
def test_resume_is_exact_across_the_switch_and_the_search(tmp_path: Path, preset: str):
    val = data(30)

    def make() -> DepS:
        config = DepS.Config.make(
            preset, steps=24, batch_size=16, evaluations=0, search=6, budgets=2, population=3, aggregation="avg"
        )
        method = DepS(supernet(), config, rivals=("late",) if preset == "small" else ())
        stages = method.stages
        method.stages = lambda train, _, seed: stages(train, val, seed=seed)
        return method

    method = resumed_equals_uninterrupted(make, data(), tmp_path, stops=(5, 9, 11))
    assert len(method.front()) == 2 and int(method.steps_done) == 24
    if preset == "small":
        rival = method.rivals["late"]
        assert rival.plan.passes == pytest.approx(method.plan.passes, rel=0.1)
        assert method.counters["late_network_passes"] == 16 * rival.plan.passes


def test_search_stays_in_its_budgets_and_students_are_calibrated():
    method = DepS(supernet(), steps=30, batch_size=16, evaluations=0, search=10, budgets=3, population=4)
    net, val = method.supernet, data(60)
    Engine(None, QUIET, seed=0).run(method, method.stages(data(), val))
    bounds = [search.budget.most["flops"] for search in method.searches.values()]
    assert bounds == sorted(bounds) and bounds[-1] == net.costs(net.largest)["flops"]
    top = list(method.searches.values())[-1].history
    assert top[0][0] == net.largest and max(score for _, score in top) >= top[0][1]
    for search, bound in zip(method.searches.values(), bounds, strict=True):
        assert len(search.history) == 10
        assert all(net.costs(code)["flops"] <= bound for code, _ in search.history)
    plain = method.subnetwork(net.smallest)
    x = torch.stack(method.calibration_inputs)
    first = plain.blocks[0].norm1
    torch.testing.assert_close(first.running_mean, plain.stem(x.flatten(1, 0) if x.ndim < 2 else x).mean((0, 1)))
    assert method.quality(net.largest, val)["accuracy"] > 0.7


def test_small_budgets_of_large_spaces_are_searched():
    net = build("elasticmbconv-w2-s3-d4-e6-k7", in_shape=(1, 8, 8), num_classes=3)
    method = DepS(net, steps=8, budgets=6, search=4, population=2)
    method.search_stage(data(30), 0)
    for search in method.searches.values():
        code = search.ask()
        assert search.budget.allows(code)


def test_a_bound_chooses_a_student_within_it():
    bound = supernet().costs(supernet().largest)["flops"] / 2
    method = DepS(supernet(), steps=10, search=0, most={"flops": bound})
    assert method.supernet.costs(method.chosen)["flops"] <= bound
    assert [b.most["flops"] for b in method.levels()][-1] == bound


def test_artifacts_are_plain_and_load(tmp_path: Path):
    run = limbeck.fit(
        "deps", task="wine", student="elasticmlp-d8-m16-l2", rivals=("bignas",), steps=30, search=4, budgets=2, population=2,
        evaluations=1, out=tmp_path / "run", engine={"progress": False},
    )  # fmt: skip
    method = run.method
    x = torch.randn(4, 13)
    loaded = limbeck.load(tmp_path / "run")
    assert type(loaded.content).__name__ == "ResidualMLP"
    assert torch.equal(loaded.content(x), method.subnetwork(method.chosen)(x))
    smallest = limbeck.load(tmp_path / "run" / "artifact" / "subnets" / "smallest").content
    assert torch.equal(smallest(x), method.subnetwork(method.supernet.smallest)(x))
    whole = limbeck.load(tmp_path / "run" / "artifact" / "supernet").content
    assert torch.equal(whole(x), method.supernet.eval()(x))
    assert run.result["pictures"][0]["title"] == "Accuracy against cost"
    assert {"uniform_accuracy", "uniform_accuracy_bignas"} <= set(run.result)
    assert run.result["rows"][0]["who"] == "student" and run.result["cost"]["bignas_network_passes"] > 0


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(x).relu())


def test_own_network_in_a_bare_loop_and_through_fit(tmp_path: Path):
    torch.manual_seed(0)
    knobs = [Knob("hidden", "width", ("fc1",), (3, 6, 12), into="fc2")]
    net = SuperNetwork(Own(), knobs, torch.zeros(1, 6))
    method = DepS(net, steps=60, networks=3)
    optimizer = torch.optim.SGD(method.trainable_parameters(), lr=0.1, momentum=0.9)
    method.watch(optimizer)
    first = method(batch()).item()
    for _ in range(59):
        loss = method(batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert method.losses(limbeck.core.batch.Batch(*batch()))["ce"].item() < 0.7 * first
    small = method.subnetwork(net.smallest)
    assert small.fc1.out_features == 3
    assert (small(batch()[0]).argmax(1) == batch()[1]).double().mean() > 0.7

    run = limbeck.fit(
        "deps", data(), student=SuperNetwork(Own(), knobs, torch.zeros(1, 6)), val=data(30), test=data(45), epochs=3, search=3,
        budgets=1, population=2, out=tmp_path / "own", engine={"progress": False},
    )  # fmt: skip
    assert run.result["rows"][0]["accuracy"] > 0.3
    again = limbeck.load(tmp_path / "own", model=run.method.supernet.extract(run.method.chosen)).content
    assert torch.equal(again(batch()[0]), run.method.subnetwork(run.method.chosen)(batch()[0]))


def test_bad_input_is_named():
    with pytest.raises(InputError, match="needs a super-network, not Linear"):
        DepS(nn.Linear(2, 2))
    with pytest.raises(InputError, match="say how long training lasts"):
        DepS(supernet())(batch())
    with pytest.raises(InputError, match="no sub-network is within the budget flops <= 10: the smallest takes"):
        DepS(supernet(), most={"flops": 10})
    with pytest.raises(InputError, match="set start above 0"):
        DepS(supernet(), target="teacher", start=0.0)
    with pytest.raises(InputError, match="its target is teacher or labels"):
        DepS(supernet(), shrinking="progressive")
    with pytest.raises(InputError, match=r"networks must be int >= 2 \(got 1\)"):
        DepS(supernet(), networks=1)
    with pytest.raises(
        InputError, match="'mlp-8' cannot be cut: it is one network, not a super-network such as elasticmlp"
    ):
        limbeck.fit("deps", task="wine", student="mlp-8")
    with pytest.raises(InputError, match="has classes 0 to 2"):
        DepS(supernet(), steps=9).check(limbeck.core.batch.Batch(torch.zeros(4, 6), torch.tensor([0, 1, 2, 3])))
    with pytest.raises(InputError, match="takes no teacher"):
        limbeck.fit("deps", data(), student=supernet(), teacher=nn.Linear(6, 3))
    with pytest.raises(InputError, match="needs labels"):
        DepS(supernet(), steps=9)(torch.zeros(4, 6))
