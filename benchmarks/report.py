"""What every benchmark prints beside its figures: when, where, with what."""

from __future__ import annotations

import datetime
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def machine() -> dict[str, str]:
    """Date, processor and the versions that matter."""
    found = {"date": datetime.date.today().isoformat(), "cpu": _processor()}
    for package in ("torch", "transformers", "peft", "plait"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def peak_megabytes() -> float:
    """Peak resident set of this process in MB (10^6 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
