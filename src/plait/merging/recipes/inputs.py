"""The models of a recipe, open for planning: numbered as a job numbers them, their layers known."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType

from plait.errors import PlaitError
from plait.merging.checkpoints import Checkpoint
from plait.merging.recipes.layers import Layout
from plait.merging.recipes.references import Reference, Shelf
from plait.merging.recipes.schema import Recipe
from plait.merging.work import Model


class Inputs:
    """References by number; a checkpoint is opened (its headers read) when it is first named."""

    def __init__(self, recipe: Recipe, shelf: Shelf) -> None:
        self.recipe, self.shelf = recipe, shelf
        self.models: list[Model] = []
        self.checkpoints: dict[str, Checkpoint] = {}
        self._numbers: dict[Reference, int] = {}
        self._layouts: dict[tuple[str, str | None], Layout] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Inputs:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def number(self, reference: Reference) -> int:
        """The input's place among the job's models."""
        if reference not in self._numbers:
            model = self.shelf.model(reference, self.recipe.base_model)
            if model.path not in self.checkpoints:
                opened = self._stack.enter_context(Checkpoint(model.path))
                self.checkpoints[model.path] = opened
            self._numbers[reference] = len(self.models)
            self.models.append(model)
        return self._numbers[reference]

    def checkpoint(self, reference: Reference) -> Checkpoint:
        return self.checkpoints[self.models[self.number(reference)].path]

    def layout(self, reference: Reference, module: str | None) -> Layout:
        checkpoint = self.checkpoint(reference)
        key = (str(checkpoint.path), module)
        if key not in self._layouts:
            self._layouts[key] = Layout(checkpoint, module)
        return self._layouts[key]

    @property
    def pattern(self) -> Reference:
        """The model whose config and other files the result takes: the base, or the first."""
        found = self.recipe.references()
        if not found:
            raise PlaitError("the recipe names no model.")
        return found[0]
