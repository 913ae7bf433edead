"""A front as an image: what was measured, the front between, and the point that was chosen."""

from __future__ import annotations

import os
from itertools import combinations
from pathlib import Path
from typing import Any

from plait.errors import PlaitError
from plait.merging.search.found import Found

PANELS = 6
"""The most pairs of objectives that are shown."""


def front_plot(found: Found, path: str | os.PathLike[str]) -> Path:
    """Write a PNG with a panel for each pair of objectives (needs matplotlib, extra `plots`)."""
    if found.front is None:
        raise PlaitError("this search has no front to plot.")
    # Without pyplot, which would choose a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    front = found.front
    count = len(front.objectives)
    pairs = list(combinations(range(count), 2))[:PANELS] or [(0, 0)]
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    chosen = found.facts["metrics"]
    for place, (i, j) in enumerate(pairs):
        axes: Any = figure.add_subplot(rows, columns, place + 1)
        axes.scatter(front.measured[:, i], front.measured[:, j], c="0.6", s=18, label="measured")
        axes.scatter(front.metrics[:, i], front.metrics[:, j], s=14, label="front (surrogates)")
        axes.scatter(chosen[i], chosen[j], marker="*", s=160, c="crimson", label="chosen")
        axes.set_xlabel(front.objectives[i])
        axes.set_ylabel(front.objectives[j])
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    return target
