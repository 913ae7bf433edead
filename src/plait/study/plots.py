"""The report's pictures, as PNG bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from plait.evaluation.figures import new_figure
from plait.evaluation.labels import Place, name_points
from plait.evaluation.page import png
from plait.study.results import Comparison, Row

COLOURS = (
    *("#3b6fb6", "#d1772c", "#2c8a6a", "#a23b72", "#7a6a1f", "#5b57a6", "#b23a3a", "#3a8fa8"),
    *("#8a8f98", "#c2a000", "#6b8e23", "#d16ba5", "#4d4d4d", "#99582a", "#1b9aaa", "#7f5539"),
)
INK = "#1d2433"


def colours(found: Comparison) -> dict[str, str]:
    """One colour a method, the same in every picture."""
    return {row.label: COLOURS[i % len(COLOURS)] for i, row in enumerate(found.rows)}


def score_plot(found: Comparison) -> bytes:
    """Scores with their intervals, the best on top, the bare base as a line."""
    rows = [row for row in found.ranked() if row.score is not None][::-1]
    figure, axes = _figure(7.2, 1.1 + 0.34 * len(rows))
    colour = colours(found)
    for place, row in enumerate(rows):
        score = row.score
        assert score is not None
        if score.low == score.low:  # one seed gives no interval
            axes.plot([score.low, score.high], [place, place], color=colour[row.label], lw=3)
        axes.plot(score.mean, place, "o", color=colour[row.label], ms=8, mec="white")
    if found.base_score is not None:
        axes.axvline(found.base_score, color="#8a8f98", lw=1, ls="--")
        axes.annotate(
            "base",
            (found.base_score, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -2),
            textcoords="offset points",
            va="top",
            fontsize=8,
            color="#5b6577",
        )
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel(_named(found))
    axes.grid(axis="x", color="#eceff4")
    return png(figure)


def loss_plot(found: Comparison) -> bytes:
    """Training loss of the finals against steps and against time, smoothed, mean over seeds."""
    figure, (left, right) = _figure(10.2, 3.6, columns=2, sharey=True)
    colour = colours(found)
    for row in found.ranked():
        if row.curves and row.score is not None:
            losses, seconds = _mean_curve(row)
            left.plot(range(1, len(losses) + 1), losses, color=colour[row.label], lw=1.5)
            right.plot(seconds, losses, color=colour[row.label], lw=1.5, label=row.label)
    left.set(xlabel="step", ylabel="training loss (smoothed)")
    right.set(xlabel="seconds of training")
    right.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return png(figure)


def rate_plot(found: Comparison) -> bytes:
    """Validation loss over learning rates; hollow: stopped early, at its last look."""
    figure, axes = _figure(8.2, 3.8)
    colour = colours(found)
    for row in found.rows:
        done = [(r["lr"], r["loss"]) for r in row.rates if r.get("loss") is not None]
        early = [
            (r["lr"], list(r["rungs"].values())[-1])
            for r in row.rates
            if r.get("loss") is None and r.get("rungs")
        ]
        if done:
            axes.plot(*zip(*done, strict=True), "o-", color=colour[row.label], lw=1.4, ms=5)
        if early:
            axes.plot(*zip(*early, strict=True), "o", color=colour[row.label], mfc="none", ms=5)
        if done or early:
            axes.plot([], [], "o-", color=colour[row.label], label=row.label)
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation loss")
    _cut_top(axes, found)
    axes.grid(color="#eceff4")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return png(figure)


def pareto_plot(found: Comparison) -> bytes:
    """Score against parameters and against the time of a step; the line joins the best."""
    figure, panels = _figure(10.2, 3.8, columns=2, sharey=True)
    sides: tuple[tuple[str, Callable[[Row], float | None], bool], ...] = (
        ("trained parameters", lambda r: r.parameters, True),
        ("milliseconds a step", lambda r: r.step_seconds and 1000 * r.step_seconds, False),
    )
    places = []
    for axes, (name, cost, logarithmic) in zip(panels, sides, strict=True):
        places.append(_pareto(axes, found, cost))
        if logarithmic:
            _maybe_log(axes)
        axes.set_xlabel(name)
        axes.grid(color="#eceff4")
    panels[0].set_ylabel(_named(found))
    for axes, here in zip(panels, places, strict=True):  # both have their limits now
        name_points(axes, here, 8)
    return png(figure)


def front(points: Sequence[tuple[float, float]], higher_is_better: bool) -> list[int]:
    """Indices of the (cost, score) points that no other beats in both, by rising cost."""
    sign = 1 if higher_is_better else -1
    best, kept = -float("inf"), []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -sign * points[i][1])):
        if sign * points[i][1] > best:
            best = sign * points[i][1]
            kept.append(i)
    return kept


def _pareto(axes: Any, found: Comparison, cost: Callable[[Row], float | None]) -> list[Place]:
    """The points of one panel, and the names that belong to them."""
    colour = colours(found)
    rows = [r for r in found.rows if r.score is not None and cost(r)]
    points = [(float(cost(r) or 0), r.score.mean if r.score else 0.0) for r in rows]
    kept = front(points, found.task["higher_is_better"])
    axes.plot([points[i][0] for i in kept], [points[i][1] for i in kept], color="#c4cad4", lw=1.2)
    for row, (x, y) in zip(rows, points, strict=True):
        score = row.score
        if score is not None and score.low == score.low:
            axes.plot([x, x], [score.low, score.high], color=colour[row.label], lw=1, alpha=0.5)
        axes.plot(x, y, "o", color=colour[row.label], ms=7, mec="white")
    return [(x, y, row.label, INK) for row, (x, y) in zip(rows, points, strict=True)]


def _maybe_log(axes: Any) -> None:
    """A logarithmic axis where counts differ much; a few percent look like nothing on one."""
    low, high = axes.get_xlim()
    data = [x for line in axes.get_lines() for x in line.get_xdata() if x > 0]
    if data and max(data) > 3 * min(data):
        axes.set_xscale("log")
    else:
        pad = 0.25 * (high - low or high)
        axes.set_xlim(max(0, low - pad), high + pad)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.tick_params(axis="x", labelsize=8)
        axes.locator_params(axis="x", nbins=5)


def _mean_curve(row: Row) -> tuple[np.ndarray, np.ndarray]:
    length = min(len(c["losses"]) for c in row.curves)
    losses = np.mean([c["losses"][:length] for c in row.curves], axis=0)
    seconds = np.mean([c["seconds"][:length] for c in row.curves], axis=0)
    window = max(1, length // 20)
    weights = np.convolve(np.ones(length), np.ones(window), mode="full")[:length]
    return np.convolve(losses, np.ones(window), mode="full")[:length] / weights, seconds


def _cut_top(axes: Any, found: Comparison) -> None:
    """Rates at which training nearly diverged must not press the others into a line."""
    rates = [r for row in found.rows for r in row.rates]
    seen = [r["loss"] for r in rates if r.get("loss") is not None]
    seen += [list(r["rungs"].values())[-1] for r in rates if r.get("loss") is None and r["rungs"]]
    seen = [value for value in seen if np.isfinite(value)]
    if seen:
        low, middle = min(seen), float(np.median(seen))
        top = min(max(seen), middle + 3 * (middle - low) + 1e-9)
        axes.set_ylim(low - 0.08 * (top - low or 1), top + 0.08 * (top - low or 1))


def _named(found: Comparison) -> str:
    better = "more" if found.task["higher_is_better"] else "less"
    return f"{found.task['metric']} on test data ({better} is better)"


def _figure(width: float, height: float, columns: int = 1, **shared: Any) -> tuple[Any, Any]:
    figure = new_figure(width, height)
    axes = figure.subplots(1, columns, squeeze=False, **shared)[0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes if columns > 1 else axes[0]
