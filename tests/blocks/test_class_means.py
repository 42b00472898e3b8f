"""Class means: by hand, before they are measured, soft labels, absent classes."""

from __future__ import annotations

import torch

from limbeck.blocks.class_means import ClassMeans

P = torch.tensor([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.2, 0.2, 0.6]])
Y = torch.tensor([0, 0, 2])


def test_means_equal_those_by_hand_and_an_absent_class_gets_the_overall_mean():
    means = ClassMeans(3)
    means.measure([(P[:1], Y[:1]), (P[1:], Y[1:])])
    expected = torch.stack([torch.tensor([0.7, 0.2, 0.1]), P.mean(0), P[2]])
    torch.testing.assert_close(means.means, expected)
    torch.testing.assert_close(means(torch.rand(2, 3), means.truth(torch.tensor([2, 1]))), expected[[2, 1]])


def test_before_measuring_the_batch_serves_and_the_means_travel_in_the_state():
    means = ClassMeans(3)
    torch.testing.assert_close(
        means(P, means.truth(Y)), torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [0.2, 0.2, 0.6]])
    )
    means.measure([(P, Y)])
    other = ClassMeans(3)
    other.load_state_dict(means.state_dict())
    assert bool(other.measured) and torch.equal(other.means, means.means)


def test_soft_labels_mix_classes():
    means = ClassMeans(3)
    means.measure([(P, Y)])
    soft = torch.tensor([[0.5, 0.0, 0.5]])
    assert torch.equal(means.truth(soft), soft)
    torch.testing.assert_close(means(P[:1], soft), (0.5 * (means.means[0] + means.means[2]))[None])
