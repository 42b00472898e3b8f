"""Freed memory stays with the process: repeated large allocations stop faulting pages in."""

from __future__ import annotations

import resource
import sys

import pytest
import torch

from limbeck.core.allocator import keep_freed_memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_repeated_allocations_reuse_their_pages():
    if not keep_freed_memory():
        pytest.skip("another C library than glibc")

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(50):
            torch.ones(4, 1 << 18).add_(1)  # 4 MiB, freed at once
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert faults() < 50 * 1024 / 10  # 4 MiB are 1,024 pages
