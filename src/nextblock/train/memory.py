"""Host memory: keep what a step frees for the next step."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed_memory() -> bool:
    """Let glibc's malloc reuse freed memory instead of giving it back; whether it could be told to.

    By default a large tensor is mapped afresh and unmapped when it is freed, and the kernel clears every one
    of its pages at the first touch: on a CPU a tenth of a training step and more. Told to use the heap for
    all sizes and never to shrink it, the second step on finds its memory as the first left it. The peak stays
    the same; after it the process gives nothing back. Other C libraries are left alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # musl
        return False
    return bool(libc.mallopt(M_MMAP_MAX, 0)) and bool(libc.mallopt(M_TRIM_THRESHOLD, -1))
