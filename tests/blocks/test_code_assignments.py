from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from limbeck.blocks import code_assignments
from limbeck.blocks.code_assignments import assignment_entropy, assignment_loss
from limbeck.blocks.vector_quantizer import VectorQuantizer
from limbeck.core.errors import InputError
from limbeck.metrics.autograd_memory import SavedTensorMeter

torch.set_num_threads(1)


def codes(similarity: str = "cosine", m: int = 7) -> VectorQuantizer:
    torch.manual_seed(0)
    return VectorQuantizer(3, m, similarity=similarity)  # type: ignore[arg-type]


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_it_is_the_divergence_of_soft_assignments(similarity: str) -> None:
    found, g, h = codes(similarity), torch.randn(5, 3), torch.randn(5, 3)
    total = 0.0
    for a, b in zip(g, h, strict=True):
        if similarity == "cosine":
            s, t = (found.codebook @ (x / x.norm()) for x in (a, b))
        else:
            s, t = (-(found.codebook - x).norm(dim=1) for x in (a, b))
        p, q = torch.softmax(t / 0.2, 0), torch.softmax(s / 0.2, 0)
        total += float((p * (p / q).log()).sum())
    assert float(assignment_loss(found, g, h, 0.2)) == pytest.approx(0.04 * total / 5, rel=1e-4)
    assert float(assignment_loss(found, g, g, 0.2)) == pytest.approx(0, abs=1e-7)


def test_only_directions_count_with_cosine() -> None:
    found, g, h = codes(), torch.randn(5, 3), torch.randn(5, 3)
    torch.testing.assert_close(assignment_loss(found, 3 * g, h, 0.1), assignment_loss(found, g, 0.2 * h, 0.1))


def test_parts_change_nothing_but_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    found, h = codes(m=200), torch.randn(90, 3)

    def run() -> tuple[torch.Tensor, torch.Tensor, int]:
        g = torch.randn(90, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with SavedTensorMeter() as meter:
            loss = assignment_loss(found, g, h, 0.1)
        loss.backward()
        assert g.grad is not None
        return loss.detach(), g.grad, meter.peak

    whole = run()
    monkeypatch.setattr(code_assignments, "CHUNK", 1000)
    parts = run()
    torch.testing.assert_close(whole[0], parts[0])
    torch.testing.assert_close(whole[1], parts[1])
    assert parts[2] < 0.1 * whole[2]


def test_entropy_tells_a_useless_temperature() -> None:
    found, h = codes(), torch.randn(50, 3)
    expected = torch.distributions.Categorical(logits=found.similarities(h) / 0.1).entropy().mean()
    assert assignment_entropy(found, h, 0.1) == pytest.approx(float(expected), rel=1e-5)
    assert assignment_entropy(found, h, 4.0) == pytest.approx(math.log(7), abs=0.02)
    assert assignment_entropy(found, F.normalize(found.codebook, dim=1), 1e-3) == pytest.approx(0, abs=1e-3)


def test_rows_that_do_not_pair_up_are_refused() -> None:
    for a, b in ((4, 5), (0, 0)):
        with pytest.raises(InputError, match="pair up"):
            assignment_loss(codes(), torch.randn(a, 3), torch.randn(b, 3), 0.1)
