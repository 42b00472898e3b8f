"""Losses over tokens: alignment of logits and labels, masks, means."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from limbeck.core.errors import InputError
from limbeck.losses.features import squarehead
from limbeck.losses.tokens import (
    block_error,
    check_token_labels,
    feature_mse,
    labelled_rows,
    token_cross_entropy,
    token_rows,
)

LABELS = torch.tensor([[3, 1, -100, 2], [0, -100, -100, -100]])


def test_causal_logits_are_about_the_next_label() -> None:
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    rows, labels = token_rows(logits, LABELS, shift=True)
    assert labels.tolist() == [1, 2]
    torch.testing.assert_close(rows, torch.stack([logits[0, 0], logits[0, 2]]))
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(token_cross_entropy(logits, LABELS, shift=True), expected)


def test_aligned_logits_are_about_their_own_label() -> None:
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    assert token_rows(logits, LABELS)[1].tolist() == [3, 1, 2, 0]
    expected = F.cross_entropy(logits.flatten(0, 1), LABELS.flatten(), ignore_index=-100)
    torch.testing.assert_close(token_cross_entropy(logits, LABELS), expected)


def test_labels_of_whole_sequences_are_rows_as_they_are() -> None:
    logits, soft = torch.randn(3, 4), torch.full((3, 4), 0.25)
    assert labelled_rows(torch.tensor([0, 1, 2])) is None
    assert labelled_rows(soft) is None
    assert token_rows(logits, soft, shift=True)[1] is soft
    with pytest.raises(InputError, match=r"\(3, 4\) do not fit labels of shape \(2,\)"):
        token_rows(logits, torch.tensor([0, 1]))


def test_a_batch_without_labels_has_no_loss_and_no_nan() -> None:
    logits = torch.randn(1, 3, 5, requires_grad=True)
    loss = token_cross_entropy(logits, torch.full((1, 3), -100))
    loss.backward()
    assert loss == 0
    assert logits.grad is not None and not logits.grad.any()


def test_labels_are_checked() -> None:
    logits = torch.randn(1, 3, 5)
    check_token_labels(logits, torch.tensor([[9, 1, 2]]), shift=True)  # the first label of a causal model is never used
    with pytest.raises(InputError, match="labels go from 1 to 9"):
        check_token_labels(logits, torch.tensor([[9, 1, 2]]), shift=False)
    with pytest.raises(InputError, match="every label of the first batch is -100"):
        check_token_labels(logits, torch.full((1, 3), -100), shift=True)


def test_the_relative_loss_is_the_plain_one_over_the_teachers_power() -> None:
    generator = torch.Generator().manual_seed(1)
    s, t = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    chosen_s, chosen_t = s[mask.bool()], t[mask.bool()]
    mse = (chosen_s - chosen_t).square().mean()
    torch.testing.assert_close(feature_mse(s, t, mask), mse)
    torch.testing.assert_close(squarehead(s, t, mask, 1e-8), mse / chosen_t.square().mean())
    torch.testing.assert_close(feature_mse(s, t), (s - t).square().mean())
    assert torch.equal(block_error(s, t, mask, None), feature_mse(s, t, mask))
    assert torch.equal(block_error(s, t, mask, 0.1), squarehead(s, t, mask, 0.1))
    with pytest.raises(InputError, match="do not fit each other"):
        feature_mse(s, t[:1])
    with pytest.raises(InputError, match=r"mask of valid tokens is \(2, 2\)"):
        block_error(s, t, mask[:, :2], None)
