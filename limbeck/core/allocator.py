"""Keep the C library from handing memory back to the system after every training step on a CPU.

glibc returns the free top of its heap once it exceeds a threshold. A training step frees all its activations at its end and
needs as much again at once, so the pages are unmapped and faulted in again in every step, which was measured to cost a tenth to
a third of a small step. A larger threshold keeps them. Elsewhere than on glibc nothing is done.
"""

from __future__ import annotations

import ctypes
import functools
import sys

KEEP_BYTES = 512 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h
_MMAP_BYTES = 32 << 20  # the largest that glibc allows; setting the one stops its own adjustment of the other


@functools.cache
def keep_freed_memory() -> bool:
    """Let the process keep up to 512 MiB of freed memory; done once, true where it could be done."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, KEEP_BYTES))
