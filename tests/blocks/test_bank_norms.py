"""The bank-based corrections against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from limbeck.blocks.bank_norms import BankNorms, log_partition
from limbeck.core.errors import InputError

torch.set_num_threads(1)


def norm(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture
def sides() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    sizes = {"gallery": 19, "gallery_bank": 31, "query_bank": 29, "queries": 11}
    return {name: norm(generator.normal(size=(n, 6)) + 0.5) for name, n in sizes.items()}


def norms(sides: dict[str, np.ndarray]) -> BankNorms:
    return BankNorms(sides["gallery"], sides["gallery_bank"], sides["query_bank"], block=(4, 7))


def test_inverted_softmax_divides_by_what_reference_queries_give(sides: dict[str, np.ndarray]) -> None:
    s, bank = sides["queries"] @ sides["gallery"].T, sides["query_bank"] @ sides["gallery"].T
    wanted = np.exp(20 * s) / np.exp(20 * bank).sum(0)
    np.testing.assert_allclose(
        norms(sides).inverted_softmax(20).scores(sides["queries"]).exp().numpy(), wanted, rtol=1e-10
    )


def test_dynamic_normalisation_corrects_only_queries_whose_first_item_is_a_hub(sides: dict[str, np.ndarray]) -> None:
    few = sides["query_bank"][:6]
    made = BankNorms(sides["gallery"], sides["gallery_bank"], few, block=(4, 7))
    s, bank = sides["queries"] @ sides["gallery"].T, few @ sides["gallery"].T
    hubs = set(bank.argmax(1).tolist())
    active = np.array([best in hubs for best in s.argmax(1)])
    assert active.any() and not active.all()  # else the test says nothing
    found = made.inverted_softmax(20, hub_k=1).scores(sides["queries"]).numpy()
    np.testing.assert_allclose(found[~active], s[~active], atol=1e-12)
    np.testing.assert_allclose(
        found[active], made.inverted_softmax(20).scores(sides["queries"]).numpy()[active], atol=1e-12
    )


def test_dual_norm_is_the_product_of_both_normalisations(sides: dict[str, np.ndarray]) -> None:
    s = sides["queries"] @ sides["gallery"].T
    of_query = np.exp(2 * s) / np.exp(2 * sides["query_bank"] @ sides["gallery"].T).sum(0)
    of_gallery = np.exp(3 * s) / np.exp(3 * sides["gallery_bank"] @ sides["gallery"].T).sum(0)
    found = norms(sides).dual_norm(2.0, 3.0).scores(sides["queries"]).exp().numpy()
    np.testing.assert_allclose(found, of_query * of_gallery, rtol=1e-10)


def test_centring_takes_the_banks_means_off(sides: dict[str, np.ndarray]) -> None:
    gallery = norm(sides["gallery"] - 0.5 * sides["gallery_bank"].mean(0))
    queries = norm(sides["queries"] - sides["query_bank"].mean(0))
    np.testing.assert_allclose(
        norms(sides).centred(0.5).scores(sides["queries"]).numpy(), queries @ gallery.T, atol=1e-12
    )
    one_side = norms(sides).centred(0.5, None).scores(sides["queries"]).numpy()
    np.testing.assert_allclose(one_side, sides["queries"] @ gallery.T, atol=1e-12)


def test_whitening_gives_both_centred_banks_one_variance(sides: dict[str, np.ndarray]) -> None:
    index = norms(sides).whitened()
    assert index.axes is not None
    centred = [sides[b] - sides[b].mean(0) for b in ("gallery_bank", "query_bank")]
    white = np.concatenate(centred) @ index.axes.numpy()
    np.testing.assert_allclose(white.T @ white / len(white), np.eye(6), atol=1e-10)
    # without power and with all components it is a rotation of the centred embeddings
    np.testing.assert_allclose(
        norms(sides).whitened(0).scores(sides["queries"]).numpy(),
        norms(sides).centred().scores(sides["queries"]).numpy(),
        atol=1e-10,
    )
    assert norms(sides).whitened(1, 3).gallery.shape == (19, 3)


def test_partitions_do_not_overflow(sides: dict[str, np.ndarray]) -> None:
    found = log_partition(sides["gallery"].astype(np.float32), sides["query_bank"].astype(np.float32), 1e4)
    best = 1e4 * (sides["gallery"] @ sides["query_bank"].T).max(1)
    assert bool(torch.isfinite(found).all())
    np.testing.assert_allclose(found.numpy(), best, rtol=1e-3)


def test_bad_input_is_one_clear_line(sides: dict[str, np.ndarray]) -> None:
    with pytest.raises(InputError, match="query bank's embeddings have 5 dimensions"):
        BankNorms(sides["gallery"], sides["gallery_bank"], sides["query_bank"][:, :5])
    with pytest.raises(InputError, match="beta must be above 0"):
        norms(sides).inverted_softmax(0)
    with pytest.raises(InputError, match="components must be between 1 and the 6"):
        norms(sides).whitened(1, 7)
