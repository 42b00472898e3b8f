from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.blocks.interpolation import Plane, linear_path, state_of
from limbeck.core.batch import Batch
from limbeck.core.data import TensorData
from limbeck.core.errors import InputError
from limbeck.metrics.landscape import (
    barrier,
    cross_entropy,
    error_rate,
    mean_at,
    mode_connectivity,
    outputs_at,
    surface,
)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def net() -> nn.Sequential:
    made = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3)
    )
    made[1].running_var.uniform_(0.5, 2)
    return made


def data(n: int = 30) -> TensorData:
    return TensorData(torch.randn(n, 1, 6, 6), torch.arange(n) % 3)


@pytest.mark.parametrize("vectorise", [True, False])
def test_outputs_are_those_of_the_networks_on_the_path(vectorise):
    a, b = net(), net()
    x = torch.randn(5, 1, 6, 6)
    own = state_of(a)
    a.train()
    found = outputs_at(a, linear_path(a, b, [0.0, 0.3, 1.0]), x, chunk=2, vectorise=vectorise)
    assert a.training and all(torch.equal(v, own[k]) for k, v in a.state_dict().items())
    middle = copy.deepcopy(a)
    with torch.no_grad():
        for name, tensor in middle.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(0.7 * own[name] + 0.3 * b.state_dict()[name])
    expected = torch.stack([m.eval()(x) for m in (a, middle, b)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not found.requires_grad


def test_means_over_the_data():
    a, b = net().eval(), net().eval()
    d = data()
    found = mean_at(a, linear_path(a, b, [0.0, 1.0]), d, {"error": error_rate, "loss": cross_entropy}, batch_size=7)
    for position, model in enumerate((a, b)):
        logits = model(d.inputs)
        assert found["error"][position].item() == pytest.approx((logits.argmax(1) != d.labels).double().mean().item())
        assert found["loss"][position].item() == pytest.approx(F.cross_entropy(logits, d.labels).item(), rel=1e-5)


def test_the_barrier():
    assert barrier(torch.tensor([0.1, 0.5, 0.9, 0.3])) == pytest.approx(0.7)
    assert barrier(torch.tensor([0.2, 0.1, 0.2])) == pytest.approx(0.0)
    with pytest.raises(InputError, match="two points"):
        barrier(torch.tensor([0.2]))


def test_permuted_hidden_units_are_a_barrier_and_a_network_has_none_with_itself():
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))
    x = torch.randn(400, 2)
    y = (x[:, 0] * x[:, 1] > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    other = copy.deepcopy(model)
    order = torch.randperm(16)
    with torch.no_grad():
        other[0].weight.copy_(model[0].weight[order])
        other[0].bias.copy_(model[0].bias[order])
        other[2].weight.copy_(model[2].weight[:, order])
    d = TensorData(x, y)
    found = mode_connectivity(model, model, other, d, points=9)
    assert found.positions.tolist() == [i / 8 for i in range(9)]
    assert found.error[0] == found.error[-1] < 0.1 and found.barrier > 0.1 and found.loss_barrier > 0.1
    alone = mode_connectivity(model, model, state_of(model), d, points=3)
    assert alone.barrier == 0 and alone.loss_barrier == pytest.approx(0, abs=1e-9)


def test_a_surface_has_the_networks_where_it_says():
    a, b, c = (nn.Linear(3, 1).double() for _ in range(3))
    plane = Plane.through(a, b, c)
    x = torch.randn(8, 3, dtype=torch.float64)

    def value(states: dict[str, Tensor]) -> Tensor:
        return outputs_at(a, states, x).squeeze(-1).mean(1)

    found = surface(plane, value, points=5, margin=0.0, chunk=3)
    assert found.values.shape == (5, 5) and torch.equal(found.corners, plane.corners)
    low, high = plane.corners.amin(0), plane.corners.amax(0)
    assert [found.x[0], found.x[-1], found.y[0], found.y[-1]] == [low[0], high[0], low[1], high[1]]
    at = {n: t[0] for n, t in plane.points(torch.stack([found.x[3], found.y[1]])[None]).items()}
    assert found.values[1, 3].item() == pytest.approx((x @ at["weight"].T + at["bias"]).mean().item())
    assert found.values[0, 0].item() == pytest.approx(value(plane.points(low[None]))[0].item())
    wider = surface(plane, value, points=2, margin=0.5)
    assert (wider.x[1] - wider.x[0]).item() == pytest.approx(2 * (high[0] - low[0]).item())


def test_bad_input():
    a, b = net(), net()
    d = data()
    states = linear_path(a, b, [0.0, 1.0])
    for call, line in (
        (lambda: outputs_at(a, {}, d.inputs), "no points"),
        (
            lambda: outputs_at(a, {k: v for k, v in states.items() if k != "0.bias"}, d.inputs),
            "'0.bias' should be there",
        ),
        (lambda: outputs_at(nn.Linear(2, 2), states, d.inputs), "'weight' should be there"),
        (lambda: mode_connectivity(a, a, b, d, points=1), "at least two points"),
        (lambda: mode_connectivity(a, a, b, TensorData(d.inputs)), "needs labels"),
        (lambda: mode_connectivity(a, a, nn.Linear(2, 2), d), "same architecture"),
        (lambda: mean_at(a, states, d, {"mean": lambda o, b: o.mean()}), "one value per sample"),
    ):
        with pytest.raises(InputError, match=line):
            call()
    one, two, three = (nn.Linear(2, 1) for _ in range(3))
    plane = Plane.through(one, two, three)
    with pytest.raises(InputError, match="at least two points"):
        surface(plane, lambda s: torch.zeros(1), points=1)
    with pytest.raises(InputError, match="one number per point"):
        surface(plane, lambda s: torch.zeros(1), points=3)


def test_measures_may_look_at_the_batch():
    a, b = net(), net()
    d = data(6)

    def first_pixel(output: Tensor, batch: Batch) -> Tensor:
        return batch.inputs[:, 0, 0, 0] + 0 * output[:, 0]

    found = mean_at(a, linear_path(a, b, [0.0, 0.5]), d, {"x": first_pixel}, batch_size=4)["x"]
    assert found.tolist() == pytest.approx([d.inputs[:, 0, 0, 0].mean().item()] * 2, rel=1e-5)
