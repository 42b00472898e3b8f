"""Inverse graph convolution against the formulas written out, its invariances, and its memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.blocks.inverse_convolution import (
    DenseBank,
    LocalBank,
    inverse_convolution,
    make_bank,
    mean_row,
    merged,
    neighbour_count,
    pushed,
)
from limbeck.blocks.nearest_rows import top_k, unit_block
from limbeck.core.errors import InputError

torch.set_num_threads(1)


def norm(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def made(seed: int = 0, n: int = 23, m: int = 41, d: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A gallery and two banks in a cone, of any length."""
    generator = np.random.default_rng(seed)
    return tuple(generator.normal(size=(rows, d)) + 0.8 for rows in (n, m, m + 5))  # type: ignore[return-value]


def by_hand(
    g: np.ndarray, banks: list[np.ndarray], strengths: list[float], k: int | None, centre: bool = True
) -> np.ndarray:
    """The published pseudo-code."""
    g = norm(g)
    branches = []
    for bank, r in zip(map(norm, banks), strengths, strict=True):
        s = g @ bank.T
        if k is None:
            w = (s - s.mean() * centre) / len(bank)
        else:
            w = np.zeros_like(s)
            for row in range(len(s)):
                best = np.argsort(-s[row])[:k]
                w[row, best] = s[row, best] / k
        branches.append(norm(g - r * w @ bank))
    return norm((branches[0] + branches[1]) / 2)


@pytest.mark.parametrize("k", [None, 1, 6])
@pytest.mark.parametrize("block", [(1024, 8192), (5, 7)])
def test_it_is_the_published_formula(k: int | None, block: tuple[int, int]) -> None:
    g, gallery_bank, query_bank = made()
    found = inverse_convolution(g, gallery_bank, query_bank, r_gallery=0.7, r_query=2.0, k=k, block=block)
    np.testing.assert_allclose(found, by_hand(g, [gallery_bank, query_bank], [0.7, 2.0], k), atol=1e-12)
    assert isinstance(found, np.ndarray) and found.dtype == np.float64


def test_numpy_and_torch_agree_and_blocks_change_nothing() -> None:
    g, gallery_bank, query_bank = (x.astype(np.float32) for x in made())
    for k in (None, 4):
        whole = inverse_convolution(g, gallery_bank, query_bank, k=k)
        tensors = (torch.from_numpy(x) for x in (g, gallery_bank, query_bank))
        other = inverse_convolution(*tensors, k=k, block=(4, 9))
        assert isinstance(other, torch.Tensor) and other.dtype == torch.float32
        np.testing.assert_allclose(other.numpy(), whole, atol=1e-6)


def test_strengths_of_zero_give_the_gallery_at_length_one_exactly() -> None:
    g, gallery_bank, query_bank = made()
    for k in (None, 3):
        found = inverse_convolution(g, gallery_bank, query_bank, r_gallery=0, r_query=0, k=k)
        np.testing.assert_array_equal(found, unit_block(g, 0, len(g)).numpy())


def test_all_neighbours_are_the_dense_form_without_centre() -> None:
    g, bank, _ = made()
    dense = inverse_convolution(g, bank, r_gallery=0.4, centre=0)
    np.testing.assert_allclose(inverse_convolution(g, bank, r_gallery=0.4, k=len(bank)), dense, atol=1e-12)
    with_share = inverse_convolution(g, bank, r_gallery=0.4, k=1.0)
    np.testing.assert_allclose(with_share, dense, atol=1e-12)


@pytest.mark.parametrize("k", [None, 5])
def test_rotations_leave_similarities_and_permutations_of_the_bank_leave_everything(k: int | None) -> None:
    g, gallery_bank, query_bank = made()
    queries = norm(made(1)[0])
    plain = inverse_convolution(g, gallery_bank, query_bank, k=k)
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(7, 7)))[0]
    turned = inverse_convolution(g @ turn, gallery_bank @ turn, query_bank @ turn, k=k)
    np.testing.assert_allclose(queries @ turn @ turned.T, queries @ plain.T, atol=1e-12)
    order = np.random.default_rng(4).permutation(len(gallery_bank))
    np.testing.assert_allclose(inverse_convolution(g, gallery_bank[order], query_bank, k=k), plain, atol=1e-12)
    # and the length of an embedding means nothing
    np.testing.assert_allclose(inverse_convolution(3 * g, gallery_bank, 0.1 * query_bank, k=k), plain, atol=1e-12)


def test_a_missing_bank_is_a_strength_of_zero() -> None:
    g, gallery_bank, query_bank = made()
    alone = inverse_convolution(g, gallery_bank, r_gallery=0.6)
    both = inverse_convolution(g, gallery_bank, query_bank, r_gallery=0.6, r_query=0)
    np.testing.assert_array_equal(alone, both)


def test_the_centre_is_the_mean_similarity() -> None:
    g, bank, _ = made()
    s0 = float((norm(g) @ norm(bank).T).mean())
    assert float(mean_row(g, (3, 3)) @ DenseBank.of(bank, (3, 3)).mean) == pytest.approx(s0, abs=1e-12)
    np.testing.assert_allclose(inverse_convolution(g, bank, centre=s0), inverse_convolution(g, bank), atol=1e-12)


def test_an_item_of_its_own_bank_is_no_neighbour_of_itself() -> None:
    g = made()[0]
    first = LocalBank(g, 1).pull(unit_block(g, 0, len(g)))
    np.testing.assert_allclose(first.numpy(), norm(g), atol=1e-6)  # itself, and nothing else
    near = norm(g) @ norm(g).T - 2 * np.eye(len(g))
    best = near.argmax(1)
    wanted = near.max(1)[:, None] * norm(g)[best]
    np.testing.assert_allclose(
        LocalBank(g, 1, skip_copies=True).pull(unit_block(g, 0, len(g))).numpy(), wanted, atol=1e-12
    )
    # a bank of copies leaves the item as it was
    copies = np.repeat(g[:1], 4, 0)
    np.testing.assert_allclose(inverse_convolution(g[:1], copies, k=2, skip_copies=True), norm(g[:1]), atol=1e-12)


def test_what_vanishes_stays_as_it_was() -> None:
    row = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    assert torch.equal(pushed(row, row, 1.0), row)
    assert torch.equal(merged([row, -row]), row)


def test_half_precision_and_files_are_read_in_blocks(tmp_path: Path) -> None:
    g, bank, _ = made()
    np.save(tmp_path / "g.npy", g.astype(np.float16))
    np.save(tmp_path / "b.npy", bank.astype(np.float16))
    mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "gb"]
    out = np.lib.format.open_memmap(tmp_path / "out.npy", mode="w+", dtype=np.float16, shape=g.shape)
    assert inverse_convolution(*mapped, k=3, block=(4, 4), out=out) is out
    np.testing.assert_allclose(out, inverse_convolution(g, bank, k=3), atol=5e-3)


@pytest.mark.parametrize("k", [None, 20])
def test_no_matrix_of_all_similarities_is_held(k: int | None) -> None:
    generator = np.random.default_rng(0)
    g = generator.normal(size=(3000, 8)).astype(np.float32)
    bank = generator.normal(size=(2500, 8)).astype(np.float32)
    peak = max(_tensor_sizes(lambda: inverse_convolution(g, bank, k=k, block=(128, 256))))
    assert peak <= 4 * max(128 * (256 + 20) * 2, 3000 * 8)  # bytes; all similarities would be 30 MB


def _tensor_sizes(work: object) -> list[int]:
    """Bytes of every tensor that an operation gives."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    sizes: list[int] = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            found = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() * t.element_size() for t in tree_leaves(found) if isinstance(t, torch.Tensor))
            return found

    with Watch():
        work()  # type: ignore[operator]
    return sizes


@pytest.mark.parametrize("skip", ["nothing", "same", "copies"])
def test_the_nearest_rows_are_those_of_the_whole_matrix(skip: str) -> None:
    g = made()[0]
    g[5] = 2 * g[3]  # a copy
    near = norm(g) @ norm(g).T
    if skip == "same":
        np.fill_diagonal(near, -np.inf)
    elif skip == "copies":
        near[near > 1 - 1e-5] = -np.inf
    values, places = top_k(g, g, 4, skip=skip, block=(6, 5))  # type: ignore[arg-type]
    np.testing.assert_allclose(values.numpy(), -np.sort(-near, axis=1)[:, :4], atol=1e-12)
    np.testing.assert_allclose(near[np.arange(len(g))[:, None], places.numpy()], values.numpy(), atol=1e-12)


def test_numbers_of_neighbours() -> None:
    assert neighbour_count(3, 10) == 3
    assert neighbour_count(0.01, 10) == 1  # never none
    assert neighbour_count(0.5, 11) == 5
    assert neighbour_count(1.0, 11) == 11
    for wrong in (0, 11, 0.0, 1.5, -0.1, True, float("nan"), "all"):
        with pytest.raises(InputError, match="k must be"):
            neighbour_count(wrong, 10)  # type: ignore[arg-type]
    assert isinstance(make_bank(made()[1], None), DenseBank)


def test_bad_input_is_one_clear_line() -> None:
    g, bank, _ = made()
    broken = g.copy()
    broken[17, 2] = np.nan
    with pytest.raises(InputError, match=r"NaN or infinity \(first in row 17\)"):
        inverse_convolution(broken, bank, block=(5, 5))
    with pytest.raises(InputError, match="7 dimensions, not 5|5 dimensions, not 7"):
        inverse_convolution(g, bank[:, :5])
    with pytest.raises(InputError, match="r_query must be a number of at least 0"):
        inverse_convolution(g, bank, r_query=-1)
    with pytest.raises(InputError, match="one embedding a row"):
        inverse_convolution(g[0], bank)
    with pytest.raises(InputError, match="must have the gallery's shape"):
        inverse_convolution(g, bank, out=np.empty((2, 7)))
    with pytest.raises(InputError, match="k must be between 1 and the bank's 41 rows"):
        top_k(g, bank, 42)
