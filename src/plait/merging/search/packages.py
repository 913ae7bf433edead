"""Packages of the extra `search`, asked for where they are needed."""

from __future__ import annotations

import importlib.util

from plait.errors import PlaitError


def require(*packages: str) -> None:
    """PlaitError for the first that is not installed."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise PlaitError(f"this search needs {name}; run `pip install 'plait[search]'`.")
