"""The bar of a merge."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def tracked(items: Iterable[T], total: int, progress: bool) -> Iterable[T]:
    """`items`, with a bar on stderr if one is wanted."""
    if not progress:
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, "merging", total=total, console=Console(stderr=True), transient=True)
