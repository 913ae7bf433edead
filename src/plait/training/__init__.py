"""Training: a recipe in, a saved and checked adapter out.

Read in this order: `recipe` (what can be set), `dryrun` (what it will do), `trainer` (the run from
start to end), `loop` (the Trainer under our rules), `checkpoint` and `parity` (what is
promised about what lies on disk).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "DryRun": "dryrun",
    "Recipe": "recipe",
    "Result": "report",
    "dry_run": "dryrun",
    "train": "trainer",
}

__all__ = ["DryRun", "Recipe", "Result", "dry_run", "train"]

if TYPE_CHECKING:
    from plait.training.dryrun import DryRun, dry_run
    from plait.training.recipe import Recipe
    from plait.training.report import Result
    from plait.training.trainer import train


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
