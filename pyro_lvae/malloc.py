"""Memory that is freed on the CPU stays with the process while a step or a chunk is repeated.

glibc hands large blocks back to the system as soon as they are freed, and the next step asks for the same again: the
kernel then clears every page anew, which takes as long as a good part of the arithmetic.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)
_KEPT = 2**30
_AFTERWARDS = 2**25  # where glibc's own adjustment ends
_lock = threading.Lock()
_num_inside = 0


@contextmanager
def kept_memory() -> Iterator[None]:
    """While any such block lasts, a GiB of freed memory is kept; the end of the last one gives it back.

    On Linux with glibc, of which older versions still give blocks above 32 MiB back at once; elsewhere, and where the
    environment tells malloc when to do so (`GLIBC_TUNABLES` or the older `MALLOC_TRIM_THRESHOLD_` and
    `MALLOC_MMAP_THRESHOLD_`), nothing is changed.
    """
    _enter(1)
    try:
        yield
    finally:
        _enter(-1)


def _enter(by: int) -> None:
    global _num_inside
    with _lock:
        before, _num_inside = _num_inside, _num_inside + by
        libc = _glibc()
        if libc is None or (before > 0 and _num_inside > 0):
            return
        kept = _KEPT if _num_inside > 0 else _AFTERWARDS
        if not libc.mallopt(_MMAP_THRESHOLD, kept):  # older versions refuse
            libc.mallopt(_MMAP_THRESHOLD, _AFTERWARDS)
        libc.mallopt(_TRIM_THRESHOLD, kept if _num_inside > 0 else 2 * kept)
        if _num_inside == 0:
            libc.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    told = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
    if any(name in os.environ for name in told) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
