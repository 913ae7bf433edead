"""The C library's memory, kept for the next tensor.

glibc gives freed memory back to the system at once where a block is large or lies on top of the
heap, and asks for it again for the next tensor: page after page, hundreds of thousands in a merge,
each zeroed and mapped anew (a quarter of the time of a TIES merge of four models).
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT, _MAPPED = 256 << 20, 64 << 20


def keep_freed_memory() -> None:
    """Keep up to 256 MB that was freed, and take blocks under 64 MB from it.

    glibc's own environment variables win; without glibc nothing happens.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        tune = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    tune(_TRIM_THRESHOLD, _KEPT)
    tune(_MMAP_THRESHOLD, _MAPPED)
