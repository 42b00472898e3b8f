"""Where paired embeddings come from: texts and code by their words, halves of digits, contrastive encoders, a generator of cones.

Every source gives, for bank, validation and test part, queries (n, D) and the gallery (n, D) as float32 rows, row i of one belonging to row i
of the other, and a line on where they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.data import mix_seed
from limbeck.core.errors import InputError
from limbeck.losses.contrastive import info_nce
from limbeck.tasks.code import Function, read_pairs, stdlib_functions
from limbeck.tasks.documented_code import distinct_pairs, documented_pairs, word_pieces

Sizes = tuple[int, int, int]
Parts = list[tuple[Tensor, Tensor]]


# ---- texts -----------------------------------------------------------------------------------------------------------


def documented_code(sizes: Sizes, dimensions: int, seed: int) -> tuple[Parts, str]:
    """Whole docstrings look for the bodies under them, see :func:`limbeck.tasks.documented_code.documented_pairs`."""
    pairs = documented_pairs()
    return text_pairs(pairs, sizes, dimensions, seed), "docstrings and bodies of Python's standard library"


def masked_code(sizes: Sizes, dimensions: int, seed: int) -> tuple[Parts, str]:
    """First sentences of docstrings look for functions whose names are masked, as in the task ``stdlib-code``."""
    pairs = distinct_pairs(stdlib_functions())
    return text_pairs(
        pairs, sizes, dimensions, seed
    ), "first sentences and masked functions of Python's standard library"


def text_file(path: Path, sizes: Callable[[int], Sizes], dimensions: int, seed: int) -> tuple[Parts, str]:
    """Pairs of texts from a file, see :func:`limbeck.tasks.code.read_pairs`; ``sizes`` of the parts by how many pairs there are."""
    pairs = read_pairs(path)
    return text_pairs(pairs, sizes(len(pairs)), dimensions, seed), str(path)


def text_pairs(pairs: Sequence[Function], sizes: Sizes, dimensions: int, seed: int) -> Parts:
    """Queries and code by one TF-IDF (sublinear counts, words in at least two texts) and truncated SVD, fitted to both sides of the bank.

    Raises:
        InputError: fewer pairs than are asked for, or a bank with hardly any words in common.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    parts = split_rows(len(pairs), sizes, seed)
    words = [
        ([word_pieces(pairs[n].query) for n in part], [word_pieces(pairs[n].code) for n in part]) for part in parts
    ]
    counts = TfidfVectorizer(analyzer=_as_it_is, sublinear_tf=True, min_df=2)
    try:
        bank = counts.fit_transform(words[0][0] + words[0][1])
    except ValueError:
        raise InputError("the bank's texts have no words in common: give more of them") from None
    reduce = TruncatedSVD(min(dimensions, *bank.shape), random_state=seed).fit(bank)

    def embedded(texts: list[list[str]]) -> Tensor:
        return F.normalize(torch.from_numpy(reduce.transform(counts.transform(texts))).float(), dim=1)

    return [(embedded(query), embedded(code)) for query, code in words]


def _as_it_is(words: list[str]) -> list[str]:
    return words


# ---- digits ----------------------------------------------------------------------------------------------------------


def digits_halves(sizes: Sizes, seed: int) -> tuple[Parts, str]:
    """The upper half of a digit (4 x 8 pixels), by ridge regression fitted to the bank, looks for its lower half; D = 32."""
    from sklearn.linear_model import Ridge

    halves = _halves(sizes, seed)
    ridge = Ridge(alpha=1.0).fit(halves[0][0].numpy(), halves[0][1].numpy())
    made = [(torch.from_numpy(ridge.predict(upper.numpy())).float(), lower) for upper, lower in halves]
    return [(F.normalize(q, dim=1), F.normalize(g, dim=1)) for q, g in made], "halves of scikit-learn's digits"


def contrastive_digits(sizes: Sizes, seed: int, steps: int = 400) -> tuple[Parts, str]:
    """Both halves through an encoder each, trained on the bank with symmetric InfoNCE: embeddings that are spread out already; D = 32."""
    halves = _halves(sizes, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix_seed(seed, 73))
        encoders = [nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 32)) for _ in range(2)]
        optimiser = torch.optim.AdamW([p for e in encoders for p in e.parameters()], lr=3e-3, weight_decay=1e-2)
        bank = halves[0]
        for _ in range(steps):
            chosen = torch.randperm(len(bank[0]))[:256]
            sides = [F.normalize(e(half[chosen]), dim=1) for e, half in zip(encoders, bank, strict=True)]
            optimiser.zero_grad()
            info_nce(sides[0], sides[1], 10.0).backward()
            optimiser.step()
    with torch.no_grad():
        made = [tuple(F.normalize(e(half), dim=1) for e, half in zip(encoders, part, strict=True)) for part in halves]
    return [(q, g) for q, g in made], "halves of scikit-learn's digits, by encoders trained with InfoNCE"


def _halves(sizes: Sizes, seed: int) -> Parts:
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images / 16.0).float()
    upper, lower = images[:, :4].flatten(1), images[:, 4:].flatten(1)
    return [(upper[part], lower[part]) for part in split_rows(len(images), sizes, seed)]


# ---- generated -------------------------------------------------------------------------------------------------------


def cones(sizes: Sizes, cone: float, seed: int, dimensions: int = 64, groups: int = 40) -> tuple[Parts, str]:
    r"""Pairs that share a latent vector, each side in a cone of its own.

    A pair has :math:`z = \tfrac12 c_h + u`, :math:`c_h` the centre of one of ``groups`` groups; a side is
    :math:`z + \sigma\epsilon + \lambda a`, with a unit direction a for each modality (cosine 0.5 between the two) and the length :math:`\lambda` =
    ``cone``. Centres, u and noise are Gaussian with variance 1/D and :math:`\sigma = 1.4`.
    """
    generator = np.random.default_rng([seed, 79])
    total = sum(sizes)

    def gaussian(rows: int) -> Any:
        return generator.normal(size=(rows, dimensions)) / np.sqrt(dimensions)

    first, second = np.linalg.qr(generator.normal(size=(dimensions, 2)))[0].T
    directions = first, 0.5 * first + np.sqrt(0.75) * second
    latent = 0.5 * gaussian(groups)[generator.integers(groups, size=total)] + gaussian(total)
    sides = [torch.from_numpy(latent + 1.4 * gaussian(total) + cone * direction).float() for direction in directions]
    query, gallery = (F.normalize(side, dim=1) for side in sides)
    places = torch.arange(total).split(list(sizes))
    return [(query[p], gallery[p]) for p in places], f"generated: {groups} groups in {dimensions} dimensions"


def split_rows(count: int, sizes: Sequence[int], seed: int) -> list[Tensor]:
    """Numbers of rows for each part, drawn at random.

    Raises:
        InputError: fewer rows than are asked for.
    """
    if sum(sizes) > count:
        raise InputError(f"there are {count} pairs, fewer than {' + '.join(map(str, sizes))}: ask for fewer")
    order = torch.from_numpy(np.random.default_rng([seed, 71]).permutation(count)[: sum(sizes)])
    return list(order.split(list(sizes)))
