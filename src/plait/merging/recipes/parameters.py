"""What a recipe says about one tensor: each parameter from the nearest level that has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plait.errors import PlaitError
from plait.merging.recipes.values import Scalar, Setting

Levels = Sequence[Mapping[str, Setting]]
"""Parameters as they stand in the recipe, the nearest level first."""


@dataclass(frozen=True)
class Parameters:
    """The parameters at one tensor of the result.

    `names` are the tensor's in each input, by which filters choose; `name` is the result's.
    `depth` goes from 0 at the first layer of a slice to 1 at its last.
    """

    name: str
    names: Sequence[str]
    inputs: Sequence[str]
    levels: Sequence[Levels]
    shared: Levels
    depth: float
    vector: bool = False

    @property
    def count(self) -> int:
        return len(self.names)

    def numbers(self, name: str, default: float | None = None) -> list[float]:
        """An input parameter, for every input; an error where one has none and needs it."""
        found = []
        for label, own, levels in zip(self.inputs, self.names, self.levels, strict=True):
            value = _first(levels, name, own, self.depth)
            if value is None and default is None:
                raise PlaitError(
                    f"{name} is missing for {label} at {self.name!r}; give it in the model's "
                    "parameters, or in those of the recipe for all."
                )
            found.append(self._number(name, default if value is None else value))
        return found

    def has(self, name: str, index: int) -> bool:
        """Whether the recipe says something of an input's parameter here."""
        return _first(self.levels[index], name, self.names[index], self.depth) is not None

    def number(self, name: str, default: float | None = None) -> float:
        """A parameter of the whole merge."""
        value = _first(self.shared, name, self.name, self.depth)
        if value is None and default is None:
            raise PlaitError(f"{name} is missing at {self.name!r}; give it in parameters.")
        return self._number(name, default if value is None else value)

    def flag(self, name: str, default: bool) -> bool:
        """A truth value of the whole merge."""
        value = _first(self.shared, name, self.name, self.depth)
        if isinstance(value, str):
            raise PlaitError(f"{name} is true or false, not {value!r}.")
        return default if value is None else bool(value)

    def value(self, name: str) -> Scalar | None:
        """A parameter of the whole merge as it stands."""
        return _first(self.shared, name, self.name, self.depth)

    def _number(self, name: str, value: Scalar | None) -> float:
        if value is None or isinstance(value, str):
            raise PlaitError(f"{name} is a number, not {value!r}, at {self.name!r}.")
        return float(value)


def _first(levels: Levels, name: str, tensor: str, depth: float) -> Scalar | None:
    for level in levels:
        if name in level:
            value = level[name].at(tensor, depth)
            if value is not None:
                return value
    return None
