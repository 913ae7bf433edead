"""Options that may have one of a few values: the `Literal` that says so is also what checks it."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from plait.errors import PlaitError


def check_choices(options: Any, where: str) -> None:
    """Raise PlaitError where a field of a dataclass holds nothing that its `Literal` type lists.

    `where` names the method in the message.
    """
    cls: Any = type(options)
    for name, choices in _choices(cls).items():
        given = getattr(options, name)
        if given not in choices:
            listed = ", ".join(map(str, choices))
            raise PlaitError(f"{where}: {name} is {given!r}; use one of {listed}.")


@cache
def _choices(cls: Any) -> dict[str, tuple[Any, ...]]:
    hints = get_type_hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    return {n: get_args(hint) for n, hint in fields.items() if get_origin(hint) is Literal}
