"""The command keeps freed memory: big temporaries do not cost their pages anew each time."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

_ROUNDS, _MEGABYTES = 50, 40
_SCRIPT = f"""
import resource
import plait.cli.allocator as allocator
{{call}}
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({_ROUNDS}):
    bytearray({_MEGABYTES} << 20)[:: 4096]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(call: str, **environment: str) -> int:
    known = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT.format(call=call)],
        env=known | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_freed_memory_is_used_again() -> None:
    pages = _ROUNDS * _MEGABYTES * (1 << 20) // os.sysconf("SC_PAGE_SIZE")
    kept = _faults("allocator.keep_freed_memory()")
    own = _faults("allocator.keep_freed_memory()", MALLOC_TRIM_THRESHOLD_="1", MALLOC_ARENA_MAX="1")
    assert kept < pages / 10
    assert own > 5 * kept  # the user's settings stand
