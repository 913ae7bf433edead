"""New pictures of matplotlib's, which is asked for where a picture is."""

from __future__ import annotations

from typing import Any

from plait.errors import PlaitError


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches; PlaitError without matplotlib (extra `plots`)."""
    try:
        from matplotlib.figure import Figure  # the object form needs no display
    except ImportError:
        raise PlaitError("plots need matplotlib; run `pip install 'plait[plots]'`.") from None
    return Figure(figsize=(width, height), layout="constrained")
