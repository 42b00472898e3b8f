"""Bytes that graphs hold, counted by hand."""

from __future__ import annotations

import torch

from limbeck.metrics.autograd_memory import SavedTensorMeter


def test_counts_what_a_product_saves_and_what_the_backward_pass_lets_go():
    a, b = torch.randn(100, requires_grad=True), torch.randn(100, requires_grad=True)
    with SavedTensorMeter() as meter:
        product = a * b  # saves both factors
        assert meter.live == 800
        again = a * b  # the same storages again: nothing new
        assert meter.live == 800
        product.sum().backward()
        assert meter.live == 800
        del again
        assert meter.live == 0 and meter.peak == 800
    torch.testing.assert_close(a.grad, b.detach())


def test_views_count_their_whole_storage_once():
    whole = torch.randn(50, 4, requires_grad=True)
    with SavedTensorMeter() as meter:
        kept = [whole[:, n].sin() for n in range(4)]  # sin saves its input, a view each time
        assert meter.live == 800
    assert len(kept) == 4


def test_a_graph_without_saved_tensors_costs_nothing():
    a = torch.randn(100, requires_grad=True)
    with SavedTensorMeter() as meter:
        (a + 1).sum().backward()
    assert meter.peak == 0
