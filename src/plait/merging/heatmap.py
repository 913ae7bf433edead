"""A merge's facts as a picture: layers by modules, one panel for each thing that can go wrong.

norms of the inputs' changes | least cosine of two inputs | conflicts of sign | energy dropped
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.merging.report import Facts

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def _spread(found: Mapping[str, Any]) -> float | None:
    """The largest input's norm over the smallest's."""
    norms = [n for n in found.get("norms", ()) if n > 0]
    return max(norms) / min(norms) if norms else None


def _least_cosine(found: Mapping[str, Any]) -> float | None:
    rows = found.get("cosines", ())
    pairs = [c for i, row in enumerate(rows) for c in row[:i]]
    return min(pairs) if pairs else None


def _mean_norm(found: Mapping[str, Any]) -> float | None:
    norms = found.get("norms", ())
    return sum(norms) / len(norms) if norms else None


PANELS: dict[str, tuple[Callable[[Mapping[str, Any]], float | None], dict[str, Any]]] = {
    "mean norm of the changes": (_mean_norm, {"vmin": 0}),
    "largest norm / smallest": (_spread, {"vmin": 1}),
    "least cosine of two inputs": (_least_cosine, {"vmin": -1, "vmax": 1, "cmap": "RdBu"}),
    "conflicts of sign": (lambda f: f.get("conflicts"), {"vmin": 0, "vmax": 1}),
    "energy dropped by the cut": (lambda f: f.get("dropped"), {"vmin": 0}),
}
"""{title: (a site's value, how it is coloured)}; a panel without values is left out."""


def heat_map(facts: Facts, path: str | os.PathLike[str]) -> Path:
    """Write the facts of a merge's sites as a PNG (needs matplotlib, extra `plots`).

    Sites outside of the layers stand in the row `none`; where there is no value the cell is grey.
    """
    # Without pyplot, which would choose a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places = {name: place_of(name) for name in facts}
    rows = sorted({layer for layer, _ in places.values()}, key=lambda i: -1 if i is None else i)
    columns = list(dict.fromkeys(part for _, part in places.values()))
    shown = {
        title: ({name: value(found) for name, found in facts.items()}, colours)
        for title, (value, colours) in PANELS.items()
    }
    shown = {t: (v, c) for t, (v, c) in shown.items() if any(x is not None for x in v.values())}
    across = min(2, len(shown)) or 1
    down = -(-len(shown) // across) or 1
    width, height = 2.2 + 0.34 * len(columns), 1.8 + 0.16 * len(rows)
    figure = Figure(figsize=(width * across, height * down), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (title, (values, colours)) in enumerate(shown.items()):
        axes = figure.add_subplot(down, across, place + 1)
        grid = _grid(values, places, rows, columns)
        image = axes.imshow(grid, aspect="auto", interpolation="nearest", **colours)
        _label(axes, title, rows, columns)
        figure.colorbar(image, ax=axes)
    target = Path(path)
    figure.savefig(target, dpi=110)
    return target


def place_of(name: str) -> tuple[int | None, str]:
    """(the layer, the module) of a site or tensor: `model.layers.3.mlp.up_proj.weight` is
    (3, "up_proj")."""
    match = _LAYER.search(name)
    parts = name.removesuffix(".weight").split(".")
    part = ".".join(parts[-2:]) if parts[-1] in ("bias", "weight") else parts[-1]
    return (None if match is None else int(match[1])), part


def _grid(
    values: Mapping[str, float | None],
    places: Mapping[str, tuple[int | None, str]],
    rows: Sequence[int | None],
    columns: Sequence[str],
) -> Any:
    """Layers x modules, NaN where there is no value; the mean where several share a place."""
    import numpy as np

    total = np.zeros((len(rows), len(columns)))
    count = np.zeros_like(total)
    for name, value in values.items():
        if value is not None:
            layer, part = places[name]
            total[rows.index(layer), columns.index(part)] += value
            count[rows.index(layer), columns.index(part)] += 1
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _label(axes: Any, title: str, rows: Sequence[int | None], columns: Sequence[str]) -> None:
    axes.set_facecolor("0.85")
    axes.set_title(title, fontsize=9)
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", rotation_mode="anchor")
    step = max(1, -(-len(rows) // 16))
    marks = range(0, len(rows), step)
    axes.set_yticks(marks, ["none" if rows[i] is None else str(rows[i]) for i in marks])
    axes.tick_params(labelsize=7)
