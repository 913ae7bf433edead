"""Calibration: is a classifier that says 80 % right eight times in ten?

A prediction's confidence is the probability of its top label. Predictions are put into bins, equal
in width (the first is [0, 1/M], the others (low, high]) or in mass (floor(N / M) predictions each,
in order of confidence, the rest in the last); a bin's gap is |accuracy - mean confidence|.

    ece              sum over bins of (predictions in it / N) * gap
    mce              the largest gap
    ace              ece with bins of equal mass
    classwise_ece    ece of every class's own probability, averaged over classes
    tace             ace over all N K probabilities of at least a threshold
    brier            mean over predictions of sum_k (p_k - y_k)^2, from 0 to 2

Everywhere `probabilities` is [N, K] with `labels` [N] of class indices; or, for what looks at the
top label only, [N] confidences with `labels` [N] saying whether each answer was right. Tensors,
arrays and lists alike; the sums are in float64.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from plait.errors import PlaitError
from plait.evaluation.figures import new_figure

Binning = Literal["width", "mass"]
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Bin:
    """Predictions of like confidence."""

    low: float
    """Where the bin begins: an edge, or the least confidence in a bin of equal mass."""
    high: float
    count: int
    confidence: float
    """Mean over its predictions; NaN in an empty bin."""
    accuracy: float

    @property
    def gap(self) -> float:
        """|accuracy - confidence|, 0 in an empty bin."""
        return abs(self.accuracy - self.confidence) if self.count else 0.0


def reliability(
    probabilities: Any, labels: Any, bins: int = 10, binning: Binning = "width"
) -> list[Bin]:
    """The bins of a reliability diagram, from the least confident up (by width: empty ones too)."""
    return _binned(*_top_label(probabilities, labels), bins, binning)


def ece(probabilities: Any, labels: Any, bins: int = 10, binning: Binning = "width") -> float:
    """Expected calibration error, in [0, 1]."""
    return _expected_gap(reliability(probabilities, labels, bins, binning))


def mce(probabilities: Any, labels: Any, bins: int = 10, binning: Binning = "width") -> float:
    """Maximum calibration error: the gap of the worst bin, however few predictions it holds."""
    return max(b.gap for b in reliability(probabilities, labels, bins, binning))


def ace(probabilities: Any, labels: Any, bins: int = 10) -> float:
    """Adaptive calibration error: `ece` with bins of equal mass."""
    return ece(probabilities, labels, bins, "mass")


def classwise_ece(probabilities: Any, labels: Any, bins: int = 10) -> float:
    """Each class's probability against how often that class was right, averaged over classes."""
    p, y = _by_class(probabilities, labels)
    found = [_expected_gap(_binned(p[:, k], y == k, bins, "width")) for k in range(p.shape[1])]
    return float(np.mean(found))


def tace(probabilities: Any, labels: Any, bins: int = 10, threshold: float = 1e-3) -> float:
    """Thresholded adaptive calibration error: all classes' probabilities that are not negligible.

    0 where no probability reaches the threshold.
    """
    p, y = _by_class(probabilities, labels)
    kept = p >= threshold
    right = y[:, None] == np.arange(p.shape[1])
    return _expected_gap(_binned(p[kept], right[kept], bins, "mass")) if kept.any() else 0.0


def brier(probabilities: Any, labels: Any) -> float:
    """Brier score: 0 for certainty that is right, 2 for certainty that is wrong."""
    p, y = _by_class(probabilities, labels)
    return float(np.square(p - (y[:, None] == np.arange(p.shape[1]))).sum(1).mean())


def reliability_plot(
    path: str | os.PathLike[str],
    probabilities: Any,
    labels: Any,
    *,
    bins: int = 10,
    binning: Binning = "width",
    title: str = "",
) -> Path:
    """Draw accuracy over confidence, with the gap to the diagonal and each bin's share of the data.

    The ending of `path` names the format (.png, .svg, .pdf); missing folders are made. Raises
    PlaitError without matplotlib.
    """
    found = [b for b in reliability(probabilities, labels, bins, binning) if b.count]
    figure = new_figure(4.6, 5.2)
    above, below = figure.subplots(2, sharex=True, height_ratios=(4, 1))
    left = [b.low for b in found]
    width = [max(b.high - b.low, 4e-3) for b in found]
    accuracy, said = [b.accuracy for b in found], [b.confidence for b in found]
    above.bar(left, accuracy, width, align="edge", color="#3b6fb6", ec="white", label="accuracy")
    gap = [c - a for a, c in zip(accuracy, said, strict=True)]
    above.bar(
        left, gap, width, accuracy, align="edge", color="#d1772c55", ec="#d1772c", label="gap"
    )
    above.plot([0, 1], [0, 1], color="#1d2433", linewidth=1, linestyle="--")
    total, worst = sum(b.count for b in found), max(b.gap for b in found)
    above.set_title(f"{title}  ECE {_expected_gap(found):.3f}, MCE {worst:.3f}".strip(), fontsize=9)
    above.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    above.legend(frameon=False, loc="upper left")
    below.bar(left, [b.count / total for b in found], width, align="edge", color="#b9c0cc")
    below.set(xlabel="confidence", ylabel="share")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    return target


# -- what the metrics share -----------------------------------------------------------------------


def _expected_gap(bins: list[Bin]) -> float:
    return sum(b.count * b.gap for b in bins) / sum(b.count for b in bins)


def _binned(confidence: Array, right: Array, bins: int, binning: Binning) -> list[Bin]:
    if bins < 1 or binning not in ("width", "mass"):
        raise PlaitError(
            f"calibration: bins must be at least 1 and binning 'width' or 'mass', not {bins} and "
            f"{binning!r}."
        )
    if binning == "mass":
        # Ties in confidence go by what was right, so that the order of the data does not matter.
        order = np.lexsort((right, confidence))
        size = max(1, len(order) // bins)
        starts = range(0, min(bins, len(order)) * size, size)
        groups = [order[s : s + size] for s in starts]
        groups[-1] = order[starts[-1] :]
        edges = [(confidence[g[0]], confidence[g[-1]]) for g in groups]
    else:
        lines = np.linspace(0, 1, bins + 1)
        which = np.searchsorted(lines[1:-1], confidence, side="left")
        groups = [np.flatnonzero(which == i) for i in range(bins)]
        edges = list(pairwise(lines))
    return [_bin(e, confidence[g], right[g]) for e, g in zip(edges, groups, strict=True)]


def _bin(edges: tuple[Any, Any], confidence: Array, right: Array) -> Bin:
    count = len(confidence)
    said, accuracy = (confidence.mean(), right.mean()) if count else (np.nan, np.nan)
    return Bin(float(edges[0]), float(edges[1]), count, float(said), float(accuracy))


def _array(values: Any) -> Array:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values
    return np.asarray(values)


def _top_label(probabilities: Any, labels: Any) -> tuple[Array, Array]:
    """(confidence [N], whether it was right [N])."""
    if _array(probabilities).ndim == 1:
        p, right = _checked(probabilities, labels)
        if not np.isin(right, (0, 1)).all():
            raise PlaitError(
                "calibration: with confidences [N], labels must say 0 or 1 (whether each answer "
                "was right); give probabilities [N, K] with class indices."
            )
        return p, right.astype(np.float64)
    p, y = _by_class(probabilities, labels)
    return p.max(1), (p.argmax(1) == y).astype(np.float64)


def _by_class(probabilities: Any, labels: Any) -> tuple[Array, Array]:
    p, y = _checked(probabilities, labels)
    if p.ndim != 2:
        raise PlaitError(f"calibration: probabilities must be [N, K], not {list(p.shape)}.")
    if y.min() < 0 or y.max() >= p.shape[1] or (y != y.astype(np.int64)).any():
        raise PlaitError(f"calibration: labels must be class indices below {p.shape[1]}.")
    if np.abs(p.sum(1) - 1).max() > 1e-2:
        raise PlaitError("calibration: rows of probabilities must sum to 1; apply a softmax first.")
    return p, y.astype(np.int64)


def _checked(probabilities: Any, labels: Any) -> tuple[Array, Array]:
    p, y = _array(probabilities).astype(np.float64), _array(labels)
    if p.ndim not in (1, 2) or not len(p) or y.shape != p.shape[:1]:
        raise PlaitError(
            f"calibration: probabilities {list(p.shape)} and labels {list(y.shape)} do not fit, or "
            "there are none; give one label for each prediction."
        )
    if not (p >= 0).all() or not (p <= 1 + 1e-6).all():
        raise PlaitError("calibration: probabilities must lie in [0, 1]; apply a softmax first.")
    return p.clip(0, 1), y
