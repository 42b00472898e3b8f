from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from limbeck.blocks.encoders import RawInput
from limbeck.core.data import TensorData
from limbeck.core.errors import InputError
from limbeck.metrics.probing import KNNProbe, LinearProbe, Standardiser, extract_features, probe


@pytest.fixture(autouse=True)
def _quiet() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def blobs(n: int, seed: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = torch.randn(n, 5, generator=generator)
    x[torch.arange(n), y] += 3
    return x * scale, y


def test_statistics_are_those_of_the_training_features():
    train, test = torch.randn(50, 4) * 3 + 1, torch.randn(9, 4)
    train[:, 2] = 7.0
    fitted = Standardiser().fit(train)
    expected = (test.numpy() - train.numpy().mean(0)) / np.where(train.numpy().std(0) < 1e-6, 1, train.numpy().std(0))
    np.testing.assert_allclose(fitted.transform(test), expected, rtol=1e-4, atol=1e-5)
    assert fitted.transform(train)[:, :2].std(0, correction=0).tolist() == pytest.approx([1, 1], rel=1e-5)
    alone = torch.cat([fitted.transform(row[None]) for row in test])
    torch.testing.assert_close(alone, fitted.transform(test))  # nothing of the test set leaks into it


def test_the_linear_probe_is_multinomial_logistic_regression():
    x, y = blobs(90, 0)
    found = LinearProbe(c=0.1).fit(x, y)
    z = torch.from_numpy(Standardiser().fit(x).transform(x).double().numpy())
    w, b = (
        torch.zeros(3, 5, dtype=torch.float64, requires_grad=True),
        torch.zeros(3, dtype=torch.float64, requires_grad=True),
    )
    optimizer = torch.optim.LBFGS([w, b], max_iter=200, line_search_fn="strong_wolfe")

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        loss = 0.5 * w.square().sum() + 0.1 * nn.functional.cross_entropy(z @ w.T + b, y, reduction="sum")
        loss.backward()
        return loss

    optimizer.step(objective)
    np.testing.assert_allclose(found.model.coef_, w.detach().numpy(), atol=2e-3)
    test = blobs(200, 1)
    assert found.score(*test) > 0.9
    np.testing.assert_array_equal(found.predict(test[0]), found.model.predict(found.standardiser.transform(test[0])))


@pytest.mark.parametrize("solver", ["logistic", "adamw"])
def test_scales_of_features_do_not_matter(solver):
    train, test = blobs(120, 0), blobs(200, 1)
    factor = torch.tensor([1e-4, 1e3, 1.0, 1e-2, 50.0])
    plain = LinearProbe(solver).fit(*train).predict(test[0])
    scaled = LinearProbe(solver).fit(train[0] * factor, train[1]).predict(test[0] * factor)
    assert (plain == scaled).double().mean() > 0.99


def test_the_adamw_probe_learns_is_seeded_and_leaves_the_random_state():
    train, test = blobs(900, 0), blobs(300, 1)
    state = torch.get_rng_state()
    with torch.no_grad():
        a = LinearProbe("adamw", epochs=100).fit(*train)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.layer.weight, LinearProbe("adamw", epochs=100).fit(*train).layer.weight)
    assert a.score(*test) > 0.8
    labels = train[1] * 2 + 5
    assert set(LinearProbe("adamw", epochs=100).fit(train[0], labels).predict(test[0]).tolist()) == {5, 7, 9}


def test_nearest_neighbours_by_hand():
    x = torch.tensor([[0.0, 0], [0, 1], [1, 0], [10, 10], [10, 11], [11, 10]])
    y = torch.tensor([0, 0, 0, 1, 1, 1])
    assert KNNProbe(3).fit(x, y).predict(torch.tensor([[2.0, 2], [8, 9]])).tolist() == [0, 1]
    train, test = blobs(60, 0), blobs(40, 1)
    fitted = KNNProbe(5).fit(*train)
    a, b = (fitted.standardiser.transform(v) for v in (train[0], test[0]))
    votes = train[1][torch.cdist(b, a).topk(5, largest=False).indices]
    torch.testing.assert_close(fitted.predict(test[0]), votes.mode(1).values)


def test_features_of_a_model_are_frozen_in_evaluation_mode():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.9)).train()
    net[0].eval()
    data = TensorData(torch.randn(10, 1, 6, 6), torch.arange(10) % 2)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    features, labels = extract_features(net, data, batch_size=4)
    assert features.shape == (10, 3) and torch.equal(labels, data.labels) and not features.requires_grad
    torch.testing.assert_close(features, net.eval()(data.inputs).mean((2, 3)))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    net.train()
    extract_features(net, data)
    assert net[2].training and net.training
    raw, none = extract_features(RawInput(), TensorData(data.inputs))
    torch.testing.assert_close(raw, data.inputs.flatten(1))
    assert none is None


def test_both_probes():
    found = probe(blobs(90, 0), blobs(90, 1), k=5)
    assert found["linear_probe"] > 0.9 and found["knn_probe"] > 0.8 and list(found) == ["linear_probe", "knn_probe"]


def test_bad_input():
    x, y = blobs(12, 0)
    for call, line in (
        (lambda: KNNProbe(20).fit(x, y), "more than the 12 training samples"),
        (lambda: KNNProbe(0), "at least 1"),
        (lambda: LinearProbe(c=0), "must be positive"),
        (lambda: LinearProbe(epochs=0), "at least 1"),
        (lambda: LinearProbe().fit(x, y[:5]), "12 features need as many"),
        (lambda: LinearProbe().fit(x, y.float()), "class indices"),
        (lambda: LinearProbe().fit(x, None), "has none"),
        (lambda: LinearProbe().fit(x, torch.zeros(12).long()), "at least two classes"),
        (lambda: LinearProbe().fit(x[:, 0], y), "must be a matrix"),
        (lambda: LinearProbe().fit(x * torch.nan, y), "NaN or infinity"),
        (lambda: LinearProbe().fit(x, y).predict(x[:, :3]), "3 wide, but those fitted on were 5"),
        (lambda: Standardiser().transform(x), "call fit first"),
    ):
        with pytest.raises(InputError, match=line):
            call()
