from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from limbeck.blocks.interpolation import linear_path
from limbeck.core.data import TensorData
from limbeck.core.errors import InputError
from limbeck.metrics.probing import KNNProbe, LinearProbe
from limbeck.tasks.judging_probes import at_most, halves, has_labels, probe_encoder, probes_along


@pytest.fixture(autouse=True)
def _quiet() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def data(n: int, seed: int = 0) -> TensorData:
    y = torch.arange(n) % 3
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    x[torch.arange(n), y] += 2
    return TensorData(x, y)


def test_parts_keep_samples_and_labels_together():
    whole = data(41)
    few = at_most(whole, 5)
    assert at_most(whole, 41) is whole and len(few) == 5
    batch = few.fetch(torch.arange(5), None)
    assert torch.equal(batch.inputs, whole.inputs[[0, 10, 20, 30, 40]])
    assert torch.equal(batch.labels, whole.labels[[0, 10, 20, 30, 40]])
    one, two = halves(whole)
    assert (len(one), len(two)) == (20, 21)
    assert sorted(one.ids.tolist() + two.ids.tolist()) == list(range(41))
    assert torch.equal(one.ids, halves(whole)[0].ids)
    with pytest.raises(InputError, match="give labelled training"):
        halves(data(3))


def test_an_encoder_is_probed():
    model, train, test = nn.Linear(6, 4), data(90), data(60, 1)
    found = probe_encoder(model, train, test, k=7)
    with torch.no_grad():
        a, b = model(train.inputs), model(test.inputs)
    assert found["linear_probe"] == LinearProbe(c=0.1).fit(a, train.labels).score(b, test.labels) > 0.5
    assert found["knn_probe"] == KNNProbe(7).fit(a, train.labels).score(b, test.labels)
    assert found["features"] == 4
    few = data(12)
    assert probe_encoder(model, few, test, k=500) == probe_encoder(model, few, test, k=12)
    assert has_labels(few) and not has_labels(TensorData(few.inputs))
    with pytest.raises(InputError, match="probes need labels"):
        probe_encoder(model, TensorData(few.inputs), test)


def test_probes_on_a_path_are_those_of_its_points():
    a, b, train, test = nn.Linear(6, 4), nn.Linear(6, 4), data(60), data(60, 1)
    model = copy.deepcopy(a)
    found = probes_along(model, model, linear_path(a, b, [0.0, 0.5, 1.0]), train, test, k=5)
    for position, end in ((0, a), (2, b)):
        expected = probe_encoder(end, train, test, k=5)
        assert (found["linear_probe"][position], found["knn_probe"][position]) == (
            expected["linear_probe"],
            expected["knn_probe"],
        )
    assert len(found["linear_probe"]) == 3 and torch.equal(model.weight, b.weight)
