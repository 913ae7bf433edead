"""Peak memory of one trial among many in the same process."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

import torch

from plait.training.report import peak_memory


class Peak:
    """Bytes at the highest since it was made: the GPU allocator's where there is one, else the
    resident memory of the process (with the base in it).

    Linux can forget the process's earlier peak; elsewhere the peak is that of the whole process so
    far, and `exact` is False.
    """

    def __init__(self) -> None:
        self.exact = True
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
            return
        self.exact = _forget()

    def read(self) -> int:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            return peak_memory()
        with suppress(OSError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            return 1024 * int(next(x for x in lines if x.startswith("VmHWM")).split()[1])
        return peak_memory()


def _forget() -> bool:
    """Hand freed memory back, and have the kernel count the peak anew."""
    if not sys.platform.startswith("linux"):
        return False
    with suppress(OSError, AttributeError):  # another C library than GNU's
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
