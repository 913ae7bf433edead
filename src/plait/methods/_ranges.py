"""The ranges that options of many methods have in common."""

from __future__ import annotations

from typing import Any

from plait.errors import PlaitError


def check_ranges(options: Any, *counts: str) -> None:
    """Raise PlaitError where an option of `counts` is below 1, or `dropout` is outside [0, 1).

    None, where an option may be None, passes.
    """
    for name in counts:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise PlaitError(f"{name} must be at least 1, not {value}.")
    dropout = getattr(options, "dropout", 0.0)
    if not 0 <= dropout < 1:
        raise PlaitError(f"dropout must lie in [0, 1), not {dropout}.")
