"""Symmetric InfoNCE against numpy, its mask of false negatives, precision, and negatives of other processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import InputError
from limbeck.losses.contrastive import gather_rows, info_nce, similarity_logits


def pair(n: int = 6, d: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=-1) for _ in range(2))
    return a, b


def reference(a: np.ndarray, b: np.ndarray, scale: float, banned: np.ndarray) -> float:
    s = scale * a @ b.T
    total = 0.0
    for logits, mask in ((s, banned), (s.T, banned.T)):
        for i, row in enumerate(logits):
            total += np.log(np.exp(row[~mask[i]]).sum()) - row[i]
    return total / (2 * len(a))


def test_equals_the_equation_and_leaves_out_false_negatives() -> None:
    a, b = pair()
    none = np.zeros((6, 6), dtype=bool)
    assert info_nce(a, b, 7.0).item() == pytest.approx(reference(a.numpy(), b.numpy(), 7.0, none))
    groups = torch.tensor([0, 1, 0, 2, 3, 1])
    same = (groups[:, None] == groups[None]).numpy() & ~np.eye(6, dtype=bool)
    masked = info_nce(a, b, 7.0, groups)
    assert masked.item() == pytest.approx(reference(a.numpy(), b.numpy(), 7.0, same))
    assert masked < info_nce(a, b, 7.0)


def test_no_gradient_pushes_false_negatives_apart() -> None:
    a, b = pair()
    b.requires_grad_()
    forth, back, target = similarity_logits(a, b, 5.0, torch.tensor([0, 0, 1, 2, 3, 4]))
    (F.cross_entropy(forth[:1], target[:1])).backward()
    assert b.grad[1].abs().max() == 0 and b.grad[2].abs().max() > 0
    assert back.shape == (6, 6)


def test_limits() -> None:
    a = torch.eye(4)
    assert info_nce(a, a, 100.0).item() == pytest.approx(0, abs=1e-6)
    assert info_nce(torch.ones(4, 3), torch.ones(4, 3)).item() == pytest.approx(np.log(4), rel=1e-6)
    assert info_nce(a[:2], a[:2], groups=torch.tensor([5, 5])).item() == pytest.approx(0, abs=1e-6)


def test_logits_are_in_single_precision_under_autocast() -> None:
    a, b = (v.to(torch.bfloat16) for v in pair())
    with torch.autocast("cpu", torch.bfloat16):
        forth, _, _ = similarity_logits(a, b)
    assert forth.dtype == torch.float32
    torch.testing.assert_close(forth, 10.0 * a.float() @ b.float().T)


def test_without_processes_gathering_does_nothing() -> None:
    a, _ = pair()
    assert gather_rows(a) is a


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: info_nce(torch.rand(3, 2), torch.rand(4, 2)), r"one shape, not \(3, 2\) and \(4, 2\)"),
        (lambda: info_nce(torch.rand(3, 2), torch.rand(3, 2), groups=torch.zeros(4)), "do not fit 3 pairs"),
    ],
)
def test_bad_input(call, line) -> None:
    with pytest.raises(InputError, match=line):
        call()


def _worker(rank: int, world: int, file: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    a, b = pair()
    weight = torch.eye(5, dtype=torch.float64).requires_grad_()
    part = slice(rank * 3, rank * 3 + 3)
    groups = torch.tensor([0, 1, 2, 0, 3, 4])
    loss = info_nce(a[part] @ weight, b[part] @ weight, 4.0, groups[part])
    loss.backward()
    total = torch.cat([loss.detach().view(1), weight.grad.flatten()])
    torch.distributed.all_reduce(total)
    if rank == 0:
        torch.save(total / world, out)
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_loss_and_gradient_of_the_whole_batch(tmp_path) -> None:
    out = str(tmp_path / "out.pt")
    torch.multiprocessing.spawn(_worker, (2, str(tmp_path / "meet"), out), nprocs=2)
    found = torch.load(out, weights_only=True)
    a, b = pair()
    weight = torch.eye(5, dtype=torch.float64).requires_grad_()
    loss = info_nce(a @ weight, b @ weight, 4.0, torch.tensor([0, 1, 2, 0, 3, 4]))
    loss.backward()
    torch.testing.assert_close(found[0], loss.detach())
    torch.testing.assert_close(found[1:].view(5, 5), weight.grad)
