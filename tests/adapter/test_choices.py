"""Options of a few values are checked against their own type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from plait.adapter import Options
from plait.adapter.choices import check_choices
from plait.errors import PlaitError

Sizes = Literal["small", "large"]


@dataclass(frozen=True)
class Base(Options):
    size: Sizes = "small"
    count: int = 3


@dataclass(frozen=True)
class Derived(Base):
    step: Literal[1, 2, None] = 1

    def __post_init__(self) -> None:
        check_choices(self, "thing")


@pytest.mark.parametrize("given", [{}, {"size": "large"}, {"step": None}, {"count": -7}])
def test_what_the_type_lists_passes_and_other_types_are_left_alone(given):
    Derived(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": "huge"}, "thing: size is 'huge'; use one of small, large."),
        ({"step": 3}, "thing: step is 3; use one of 1, 2, None."),
        ({"size": ["small"]}, r"size is \['small'\]"),
    ],
)
def test_anything_else_is_refused_by_name(given, message):
    with pytest.raises(PlaitError, match=message):
        Derived(**given)
