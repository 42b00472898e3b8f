from __future__ import annotations

import networkx
import numpy as np
import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from limbeck.core.errors import InputError
from limbeck.methods.structures.notears import NOTEARS


def chain(n: int = 300) -> np.ndarray:
    x = np.random.default_rng(0).normal(2.0, 1.0, (n, 3))
    x[:, 0] += 1.5 * x[:, 2]
    x[:, 1] += -1.2 * x[:, 0]
    return x


@parametrize_with_checks([NOTEARS(max_iter=2)])
def test_it_is_an_estimator(estimator: NOTEARS, check: object) -> None:
    check(estimator)  # type: ignore[operator]


def test_it_finds_a_chain_and_gives_a_graph() -> None:
    found = NOTEARS(0.05).fit(chain())
    assert set(found.to_networkx().edges) == {(2, 0), (0, 1)} and networkx.is_directed_acyclic_graph(
        found.to_networkx()
    )
    assert found.order_.tolist().index(2) < found.order_.tolist().index(0) < found.order_.tolist().index(1)
    assert found.h_ <= 1e-8 and found.n_iter_ > 1
    short = chain() - found.predict(chain())
    assert found.score(chain()) == pytest.approx(-0.5 * (short**2).sum() / 300)
    assert abs(short.mean(0)).max() < 1e-9  # columns are centred


def test_wrong_settings() -> None:
    for settings, words in (
        ({"l1": -1}, "l1 must be >= 0"),
        ({"max_iter": 0}, "max_iter must be >= 1"),
        ({"acyclicity": "log-det"}, "acyclicity must be one of exponential, polynomial"),
        ({"threshold": "x"}, "threshold must be >= 0"),
    ):
        with pytest.raises(InputError, match=words):
            NOTEARS(**settings).fit(chain())  # type: ignore[arg-type]
