"""Names beside the points of a picture, where they cover neither a point nor each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Place = tuple[float, float, str, str]
"""x, y, name and colour."""


def name_points(axes: Any, places: Sequence[Place], size: float = 7.5) -> None:
    """Write names as near to their points as they fit, with a thin line where that is not beside.

    `axes` are matplotlib's, with their limits and scales final.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    figure = axes.figure
    if not isinstance(figure.canvas, FigureCanvasAgg):
        FigureCanvasAgg(figure)  # sizes of text need a renderer
    figure.canvas.draw()
    renderer, frame = figure.canvas.get_renderer(), axes.get_window_extent()
    pixel = 72 / figure.dpi
    points = [axes.transData.transform((x, y)) for x, y, *_ in places]
    taken = [Bbox.from_bounds(px - 4, py - 4, 8, 8) for px, py in points]
    for (x, y, name, colour), (px, py) in zip(places, points, strict=True):
        style = {"fontsize": size, "color": colour, "va": "center"}
        text = axes.annotate(name, (x, y), (6, 0), textcoords="offset points", **style)
        text.set_in_layout(False)  # or the axes would shrink for it, and move the points
        extent = text.get_window_extent(renderer)
        for dx, dy in _offsets(extent.width, extent.height):
            box = Bbox.from_bounds(
                px + dx, py + dy - extent.height / 2, extent.width, extent.height
            )
            inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 < frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        text.set_position((dx * pixel, dy * pixel))
        taken.append(box)
        if abs(dy) > extent.height:
            near = px + dx + (extent.width if dx < 0 else 0)
            end = axes.transData.inverted().transform((near, py + dy))
            axes.plot([x, end[0]], [y, end[1]], color=colour, linewidth=0.4, alpha=0.6)


def _offsets(width: float, height: float) -> list[tuple[float, float]]:
    """Places for a name's left middle, in pixels from its point: nearest first, right before
    left."""
    steps = [n * height * 1.05 for n in range(30)]
    rows = [dy for step in steps for dy in (step, -step)]
    return [(dx, dy) for dy in rows for dx in (8.0, -8.0 - width, 30.0, -30.0 - width)]
