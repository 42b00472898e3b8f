"""Language models are judged token by token, without their logits being kept."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck import networks
from limbeck.core.data import TensorData
from limbeck.core.errors import InputError
from limbeck.tasks.judging_language import check_token_teacher, continued, judge_language_models, token_measures
from limbeck.tasks.text_windows import TokenWindows


def gpt(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return networks.build("gpt-d16-l2-h2", in_shape=(8,), num_classes=11).eval()


def test_measures_are_those_of_all_logits_at_once() -> None:
    tokens = torch.randint(11, (203,), generator=torch.Generator().manual_seed(0))
    data = TokenWindows(tokens, 8)
    student, teacher = gpt(0), gpt(1)
    found = judge_language_models({"student": student, "teacher": teacher}, data, shift=True, batch_size=3)
    batch = data.fetch(torch.arange(len(data)), None)
    with torch.no_grad():
        s, t = (m(**batch.inputs).logits[:, :-1].flatten(0, 1).double() for m in (student, teacher))
    labels = batch.labels[:, 1:].flatten()
    s, t, labels = s[labels != -100], t[labels != -100], labels[labels != -100]
    assert len(labels) == 202
    first = found["rows"][0]
    assert first["nll"] == pytest.approx(float(F.cross_entropy(s, labels)), rel=1e-6)
    assert first["perplexity"] == pytest.approx(math.exp(first["nll"]))
    assert first["accuracy"] == float((s.argmax(1) == labels).double().mean())
    kl = F.kl_div(s.log_softmax(1), t.log_softmax(1), log_target=True, reduction="batchmean")
    assert found["agreement"]["kl"] == pytest.approx(float(kl), rel=1e-5)
    assert found["agreement"]["top1_agreement"] == float((s.argmax(1) == t.argmax(1)).double().mean())
    assert first["parameters"] == sum(p.numel() for p in student.parameters()) and first["latency_ratio"] == 1
    assert token_measures(student, data, shift=True)["nll"] == pytest.approx(first["nll"])


def test_taggers_have_no_perplexity() -> None:
    torch.manual_seed(0)
    tagger = networks.build("berttagger-d16-l1-h2-v11", in_shape=(8,), num_classes=3)
    data = TokenWindows(torch.arange(50) % 11, 8, tags=torch.arange(50) % 3)
    found = judge_language_models({"student": tagger}, data, shift=False, perplexity=False)
    assert "perplexity" not in found["rows"][0] and "agreement" not in found
    assert tagger.training


def test_data_without_labels_is_refused() -> None:
    with pytest.raises(InputError, match="the data has none"):
        token_measures(gpt(0), TensorData(torch.zeros(2, 8, dtype=torch.long)), shift=True)
    none = TensorData(torch.zeros(2, 8, dtype=torch.long), torch.full((2, 8), -100))
    with pytest.raises(InputError, match="no token of the data has a label"):
        token_measures(gpt(0), none, shift=True)


class Next(nn.Module):
    """Sure that the next token is the one after this."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return 50.0 * F.one_hot((input_ids + 1) % 11, 11).float()


def test_teachers_that_know_nothing_are_noticed() -> None:
    counting, constant = (TokenWindows(t, 8) for t in (torch.arange(50) % 11, torch.full((50,), 3)))
    assert check_token_teacher(Next(), counting, shift=True) == 1.0
    with pytest.warns(UserWarning, match=r"right about 0.0% of the validation tokens, .* \(100.0%\)"):
        check_token_teacher(Next(), constant, shift=True)


def test_texts_are_drawn_with_common_numbers() -> None:
    prompt = torch.tensor([1, 2, 3])
    first = continued(gpt(0), prompt, 20, window=8, seed=5)
    assert torch.equal(first, continued(gpt(0), prompt, 20, window=8, seed=5))
    assert not torch.equal(first, continued(gpt(0), prompt, 20, window=8, seed=6))
    assert first.shape == (20,) and first.max() < 11
    assert continued(Next(), prompt, 5, window=8).tolist() == [4, 5, 6, 7, 8]
