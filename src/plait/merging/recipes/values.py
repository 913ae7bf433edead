"""Parameter values of a recipe: one number, a gradient over the layers, or a list by tensor name.

weight: 0.5
weight: [0, 0.3, 1]                       interpolated over the layers of a slice
weight: [{filter: mlp, value: [0, 1]}, {value: 0.5}]          the first filter that fits
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Scalar = float | bool | str


class BadValueError(ValueError):
    """A value that is none of these; `at` says where in it the fault lies."""

    def __init__(self, message: str, *at: str | int) -> None:
        super().__init__(message)
        self.at = at

    def below(self, *at: str | int) -> BadValueError:
        return BadValueError(str(self), *at, *self.at)


@dataclass(frozen=True)
class Setting:
    """A value as the recipe gives it: cases in order, each a filter (None fits all) and points."""

    cases: tuple[tuple[str | None, tuple[Scalar, ...]], ...]

    def at(self, name: str, depth: float) -> Scalar | None:
        """The value for a tensor of this name at a depth in [0, 1]; None where no filter fits."""
        for wanted, points in self.cases:
            if wanted in (None, "*") or (wanted is not None and wanted in name):
                return _interpolated(points, depth)
        return None


def parse_setting(value: Any) -> Setting:
    """A setting from what YAML holds; BadValueError says where it is wrong."""
    if not isinstance(value, list) or not any(isinstance(item, Mapping) for item in value):
        return Setting(((None, _points(value)),))
    cases = []
    for place, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise BadValueError(
                "a list holds numbers (a gradient) or filters, not both; write {value: ...}.", place
            )
        cases.append(_case(item, place))
    return Setting(tuple(cases))


def _case(item: Mapping[Any, Any], place: int) -> tuple[str | None, tuple[Scalar, ...]]:
    for key in item:
        if key not in ("filter", "value"):
            raise BadValueError(f"unknown key {key!r}; filter and value are known.", place, key)
    if "value" not in item:
        raise BadValueError("a filter needs a value.", place)
    wanted = item.get("filter")
    if wanted is not None and not isinstance(wanted, str):
        raise BadValueError(f"a filter is a part of a tensor's name, not {wanted!r}.", place)
    try:
        return wanted, _points(item["value"])
    except BadValueError as error:
        raise error.below(place, "value") from None


def _points(value: Any) -> tuple[Scalar, ...]:
    if not isinstance(value, list):
        return (_scalar(value),)
    if not value:
        raise BadValueError("an empty list is no gradient; give at least one value.")
    points = []
    for place, item in enumerate(value):
        try:
            points.append(_scalar(item))
        except BadValueError as error:
            raise error.below(place) from None
    if len({isinstance(p, float) for p in points}) > 1:
        raise BadValueError("a gradient holds numbers, or truth values, or names; not several.")
    return tuple(points)


def _scalar(value: Any) -> Scalar:
    if isinstance(value, bool):
        return value
    if isinstance(value, str):  # YAML takes 1e-5 for a word
        try:
            value = float(value)
        except ValueError:
            return value
    if not isinstance(value, int | float):
        raise BadValueError(f"{value!r} is no number, truth value, list of them, or filters.")
    if not math.isfinite(value):
        raise BadValueError(f"{value} is not a finite number.")
    return float(value)


def _interpolated(points: Sequence[Scalar], depth: float) -> Scalar:
    """Between the two points that a depth lies between; of words and truth values the lower."""
    place = depth * (len(points) - 1)
    below = min(int(place), len(points) - 1)
    low = points[below]
    if below == place or not isinstance(low, float):
        return low
    high = points[below + 1]
    assert isinstance(high, float)
    return low + (place - below) * (high - low)
