"""What methods are compared on: a base, batches to train on, and a score on held-out examples.

Subclass `Task` in a file of your own and name it to the bake-off: `plait compare tasks.py:Digits`.
A recipe becomes one too (`recipe_task.RecipeTask`).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from plait.errors import PlaitError
from plait.training.recipe import Recipe


class Task:
    """One task. Every process of a bake-off makes one of its own, so it must pickle.

    Attributes:
        name: what it is called in reports.
        title: a sentence about it.
        metric: what `scores` are ("accuracy", "loss").
        higher_is_better: whether a greater score is a better one.
        recipe: what all methods share: targets, train_modules, steps, batch size, scheduler,
            warmup, clip, weight_decay, and the method and options that the budget of parameters is
            taken from.
    """

    name: str = "task"
    title: str = ""
    metric: str = "accuracy"
    higher_is_better: bool = True
    recipe: Recipe = Recipe(steps=100)

    def load(self) -> nn.Module:
        """A fresh base model. Called once a process (again only where a trial left it changed)."""
        raise NotImplementedError

    def batches(self, seed: int) -> Iterator[Any]:
        """Endless training batches; the same seed gives the same ones, whatever the method."""
        raise NotImplementedError

    def loss(self, model: Any, batch: Any) -> Tensor:
        """The training loss. Batches are dicts that transformers-like models take, as here; the
        initialisers that look at data call `model(**batch).loss` themselves."""
        return model(**batch).loss

    def validate(self, model: Any) -> float:
        """A loss (less is better) on validation data: learning rates are chosen by it."""
        raise NotImplementedError

    def scores(self, model: Any) -> Iterable[float]:
        """One number for each test example, always in the same order. A generator may be stopped
        between two of them when time is up."""
        raise NotImplementedError

    def validation_batches(self) -> Sequence[Any] | None:
        """For rules that learn on held-out data (never the test data)."""
        return None

    def steps(self) -> int:
        """The wanted length of a trial; a short budget makes it shorter."""
        return self.recipe.steps or 100

    def facts(self) -> dict[str, Any]:
        """What must be the same for an interrupted bake-off to go on: sizes of data, settings."""
        return {}


def open_task(spec: str) -> Task:
    """The task that `module:object` or `path/to/file.py:object` names: a `Task`, or what makes one.

    The module is imported, so name only what you trust.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise PlaitError(f"task {spec!r}: write module:object or file.py:object.")
    try:
        found = getattr(_module(place), name)
    except (ImportError, AttributeError, FileNotFoundError) as error:
        raise PlaitError(f"task {spec!r}: {error}.") from None
    made = found if isinstance(found, Task) else found() if callable(found) else found
    for need in ("load", "batches", "validate", "scores", "recipe"):
        if not hasattr(made, need):
            raise PlaitError(f"task {spec!r} has no {need!r}; derive it from plait.study.Task.")
    return made


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        if os.getcwd() not in sys.path:  # as `python -m` would
            sys.path.insert(0, os.getcwd())
        return importlib.import_module(place)
    file = Path(place).resolve()
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {place}")
    # By its own name and folder, so that other processes, which unpickle the task, find it too.
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    module = importlib.import_module(file.stem)
    if Path(getattr(module, "__file__", None) or "").resolve() != file:
        raise ImportError(f"another module is already called {file.stem!r}; rename the file")
    return module
