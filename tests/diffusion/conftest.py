from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """Unseeded draws are the same in every run."""
    torch.manual_seed(0)
