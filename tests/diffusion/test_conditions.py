from __future__ import annotations

import pytest
import torch

from limbeck.core.data import TensorData
from limbeck.core.errors import InputError
from limbeck.diffusion.conditions import Conditions, concat, drop, null_like, rows, take

LABELS = torch.tensor([2, 0, 1, 0, 2])
PROMPTS = {"text": torch.arange(15.0).view(5, 3), "size": torch.arange(5)}


def test_rows_take_and_concat():
    assert rows(None) is None and rows(LABELS) == 5 and rows(PROMPTS) == 5
    ids = torch.tensor([[4, 0]])
    assert take(LABELS, ids).tolist() == [2, 2] and take(None, ids) is None
    assert torch.equal(take(PROMPTS, ids)["text"], PROMPTS["text"][[4, 0]])
    assert concat(LABELS, LABELS).tolist() == LABELS.tolist() * 2 and concat(None, None) is None
    assert concat(PROMPTS, PROMPTS)["size"].tolist() == [*range(5), *range(5)]
    with pytest.raises(InputError, match="as many rows"):
        rows({"a": torch.zeros(2), "b": torch.zeros(3)})


def test_the_null_condition_takes_the_kind_of_the_condition():
    assert null_like(torch.tensor(9), LABELS, 3).tolist() == [9, 9, 9]
    made = null_like({"text": torch.full((3,), -1.0)}, PROMPTS, 5)
    assert bool((made["text"] == -1).all()) and torch.equal(made["size"], PROMPTS["size"])  # what it leaves out stays
    half = null_like(torch.zeros(3), PROMPTS["text"].bfloat16(), 5)
    assert half.dtype == torch.bfloat16 and half.shape == (5, 3)
    with pytest.raises(InputError, match="null_cond"):
        null_like(None, LABELS, 2)
    with pytest.raises(InputError, match="shape"):
        null_like(torch.zeros(4), PROMPTS["text"], 5)
    with pytest.raises(InputError, match="one kind"):
        null_like({"text": torch.zeros(3)}, LABELS, 5)
    with pytest.raises(InputError, match="one kind"):
        null_like(torch.tensor(1), PROMPTS, 5)


def test_conditions_are_dropped_with_the_probability_and_whole():
    many = torch.zeros(4000, dtype=torch.long)
    gone = drop(many, torch.tensor(9), 0.3, torch.Generator().manual_seed(0))
    assert float((gone == 9).float().mean()) == pytest.approx(0.3, abs=0.03) and int(many.max()) == 0
    assert drop(many, torch.tensor(9), 0.0) is many and drop(None, None, 0.5) is None
    assert bool((drop(many, torch.tensor(9), 1.0) == 9).all())
    parts = {"a": torch.ones(400, 2), "b": torch.ones(400)}
    null = {"a": torch.zeros(2), "b": torch.tensor(0.0)}
    found = drop(parts, null, 0.5, torch.Generator().manual_seed(1))
    assert torch.equal(found["a"][:, 0], found["b"])  # a row loses all its parts or none
    assert 0.4 < float(found["b"].mean()) < 0.6


def test_a_list_of_conditions():
    made = Conditions(LABELS)
    assert len(made) == 5 and made.rows(torch.tensor([0, 2])).tolist() == [2, 1]
    drawn = made.draw(6, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, made.draw(6, torch.Generator().manual_seed(0))) and drawn.shape == (6,)
    assert made.spread(3).tolist() == [0, 1, 2]  # every class once before any comes again
    assert sorted(made.spread_ids(5).tolist()) == [0, 1, 2, 3, 4]
    batch = made.fetch(torch.tensor([1, 4]), None)
    assert batch.inputs["cond"].tolist() == [0, 2] and not made.augmented
    prompts = Conditions(PROMPTS)
    assert torch.equal(prompts.spread(6)["text"], PROMPTS["text"][[0, 1, 2, 3, 4, 0]])
    nothing = Conditions(None, 7)
    assert len(nothing) == 7 and nothing.draw(3) is None and "cond" not in nothing.fetch(torch.arange(2), None).inputs


def test_conditions_from_what_users_have():
    made = Conditions(LABELS)
    assert Conditions.of(made) is made and len(Conditions.of(None, 12)) == 12
    assert Conditions.of(LABELS).values is LABELS and len(Conditions.of(PROMPTS)) == 5
    data = TensorData(torch.randn(5, 2), LABELS)
    found = Conditions.of(data).values
    assert isinstance(found, torch.Tensor) and found.tolist() == LABELS.tolist()
    assert Conditions.of(TensorData(torch.randn(5, 2))).values is None
    for wrong in ("a cat", [1, 2]):
        with pytest.raises(InputError, match="conditions are"):
            Conditions.of(wrong)
    with pytest.raises(InputError, match="empty"):
        Conditions(torch.zeros(0))
    with pytest.raises(InputError, match="values, or a count"):
        Conditions()
