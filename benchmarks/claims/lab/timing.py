"""Interleaved timing, for claims about speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def cpu_seconds(
    contenders: Mapping[str, Callable[[], object]], rounds: int = 15, warm: int = 2
) -> dict[str, list[float]]:
    """CPU seconds of each contender, round by round, so that drift meets all of them alike."""
    for _ in range(warm):
        for work in contenders.values():
            work()
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, work in contenders.items():
            start = time.process_time()
            work()
            found[name].append(time.process_time() - start)
    return found


def paired_ratio(seconds: Mapping[str, list[float]], ours: str, theirs: str) -> float:
    """Median of the ratios of neighbouring runs."""
    pairs = zip(seconds[ours], seconds[theirs], strict=True)
    return statistics.median(a / b for a, b in pairs)
