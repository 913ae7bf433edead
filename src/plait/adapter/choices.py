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


def fitting_rank(delta: Any) -> int:
    """The rank in the options of a delta whose site has as many directions.

    Raises PlaitError where the rank is above the site's shorter side.
    """
    rank, site = delta.options.rank, delta.site
    if rank > min(site.shape):
        raise PlaitError(
            f"rank {rank} exceeds the shorter side of {site.path!r} {list(site.shape)}; "
            "lower it there with overrides=."
        )
    return int(rank)
