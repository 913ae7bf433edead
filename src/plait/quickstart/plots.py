"""The report's pictures, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

COLOURS = ("#3b6fb6", "#d1772c", "#2c8a6a")
MERGED = "merged"


def loss_plot(facts: dict[str, Any]) -> bytes:
    """Training loss over steps, one line an adapter."""
    figure, axes = _figure(9, 3.4)
    for colour, (name, training) in zip(COLOURS, facts["train"].items(), strict=False):
        points = [(r["step"], r["loss"]) for r in training["history"] if "loss" in r]
        axes.plot(*zip(*points, strict=True), color=colour, label=name, linewidth=1.6)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _png(figure)


def score_plot(facts: dict[str, Any]) -> bytes:
    """Bars of the scores with their intervals."""
    figure, axes = _figure(9, 3.0)
    names = list(facts["scores"])
    for offset, (label, colour) in enumerate(
        zip(("base", "its adapter", MERGED), ("#b9c0cc", *COLOURS[:2]), strict=True)
    ):
        scores = [
            facts["scores"][n]["scores"][n if label == "its adapter" else label] for n in names
        ]
        values = [s["value"] for s in scores]
        below = [max(v - s["low"], 0) for v, s in zip(values, scores, strict=True)]
        above = [max(s["high"] - v, 0) for v, s in zip(values, scores, strict=True)]
        places = [i + 0.27 * (offset - 1) for i in range(len(names))]
        axes.bar(places, values, 0.25, label=label, color=colour)
        axes.errorbar(places, values, [below, above], fmt="none", ecolor="#1d2433", capsize=2, lw=1)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.2))
    return _png(figure)


def norm_plot(facts: dict[str, Any]) -> bytes:
    """Heat maps of the norm of dW, modules by layers, one panel an adapter on one colour scale."""
    found = facts["inspect"]
    figure, panels = _figure(9, 1.55 * len(found) + 0.4, rows=len(found))
    top = max(s["norm"] or 0 for f in found.values() for s in f["sites"])
    for axes, (name, report) in zip(panels, found.items(), strict=True):
        modules, table = _by_module(report["sites"])
        image = axes.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=top)
        axes.set_yticks(range(len(modules)), modules, fontsize=7)
        axes.set_title(name, loc="left", fontsize=9)
        axes.spines[:].set_visible(False)
        figure.colorbar(image, ax=axes, pad=0.01)
    panels[-1].set_xlabel("layer")
    return _png(figure)


def _by_module(sites: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[float]]]:
    placed = [s for s in sites if s["layer"] is not None]
    modules = list(dict.fromkeys(s["module"] for s in placed))
    layers = 1 + max(s["layer"] for s in placed)
    table = [[0.0] * layers for _ in modules]
    for site in placed:
        table[modules.index(site["module"])][site["layer"]] = site["norm"] or 0.0
    return modules, table


def _figure(width: float, height: float, rows: int | None = None) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # the object form needs no display

    figure = Figure(figsize=(width, height), layout="constrained")
    if rows is None:
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        return figure, axes
    return figure, figure.subplots(rows, squeeze=False)[:, 0]


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
