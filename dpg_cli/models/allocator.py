"""How this process is given memory, set once before the first tensor.

A metagradient makes and drops thousands of tensors of 1 to 16 MB. By default the C library returns each to the system
and is given fresh pages for the next, which are zeroed first: a matrix product into fresh memory takes up to twice as
long. So freed memory of that size is kept for the next tensor, and PyTorch asks for huge pages, which the system hands
out three times as fast. Neither changes a result; `DPG_ALLOCATOR=default` leaves both alone.
"""

from __future__ import annotations

import ctypes
import os

KEPT = 16 << 20  # bytes of the largest block that is kept; larger ones go back to the system
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def settle() -> None:
    """Set the process's allocator, unless `DPG_ALLOCATOR` or a variable of its own says otherwise."""
    if os.environ.get("DPG_ALLOCATOR") == "default":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch reads it at its first tensor
    if any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    mallopt(_MMAP_THRESHOLD, KEPT)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
