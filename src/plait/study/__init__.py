"""Studies: which method is best on your data, told by an honest bake-off.

    found = plait.study.compare("recipe.yaml", "lora,dora,pissa", budget="30m")
    found.winner, found.advice, found.report

Read in this order: `comparing` (what can be asked), `bakeoff` (the course), `bench` (one trial),
`planning` (the budget), `inference` (what may be concluded), `task` (tasks of your own).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "Comparison": "results",
    "Contender": "contender",
    "Event": "comparing",
    "RecipeTask": "recipe_task",
    "Task": "task",
    "compare": "comparing",
    "judge": "inference",
    "open_task": "task",
}

__all__ = [
    "Comparison",
    "Contender",
    "Event",
    "RecipeTask",
    "Task",
    "compare",
    "judge",
    "open_task",
]

if TYPE_CHECKING:
    from plait.study.comparing import Event, compare
    from plait.study.contender import Contender
    from plait.study.inference import judge
    from plait.study.recipe_task import RecipeTask
    from plait.study.results import Comparison
    from plait.study.task import Task, open_task


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
