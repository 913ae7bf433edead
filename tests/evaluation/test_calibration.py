"""Calibration metrics: values worked out by hand, and properties that must hold for any data."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait import PlaitError
from plait.evaluation.calibration import (
    ace,
    brier,
    classwise_ece,
    ece,
    mce,
    reliability,
    reliability_plot,
    tace,
)

THREE = np.array([[0.9, 0.1], [0.65, 0.35], [0.4, 0.6]])
"""Top labels 0, 0, 1 at 0.9, 0.65 and 0.6."""


def softmaxed(seed: int, count: int = 60, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    logits = 2 * random.normal(size=(count, classes))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return p, random.integers(0, classes, count)


def test_three_predictions_by_hand() -> None:
    labels = [0, 1, 1]  # right at 0.9, wrong at 0.65, right at 0.6
    # (0.8, 0.9]: gap 0.1; (0.6, 0.7]: gap 0.65; (0.5, 0.6]: gap 0.4
    assert ece(THREE, labels) == pytest.approx((0.1 + 0.65 + 0.4) / 3)
    assert mce(THREE, labels) == pytest.approx(0.65)
    # two bins of equal mass, floor(3 / 2) = 1: {0.6}, then the rest {0.65, 0.9}
    assert ace(THREE, labels, bins=2) == pytest.approx(0.4 / 3 + 2 / 3 * abs(0.5 - 0.775))
    # (0.01 + 0.01 + 0.65^2 * 2 + 0.16 * 2) / 3
    assert brier(THREE, labels) == pytest.approx((0.02 + 2 * 0.4225 + 0.32) / 3)


def test_classwise_and_thresholded_by_hand() -> None:
    p, labels = np.array([[0.95, 0.05], [0.85, 0.15], [1.0, 0.0]]), [0, 1, 0]
    # class 0, four bins: all three in (0.75, 1], right 2/3, said 2.8/3; class 1: 1/3 and 0.2/3
    assert classwise_ece(p, labels, bins=4) == pytest.approx(0.8 / 3)
    # 0 lies below the threshold; sorted 0.05 x, 0.15 +, 0.85 x, 0.95 +, 1 +; two bins of 2 and 3
    first, second = abs(0.5 - 0.1), abs(2 / 3 - 2.8 / 3)
    assert tace(p, labels, bins=2) == pytest.approx(2 / 5 * first + 3 / 5 * second)
    assert tace(p, labels, threshold=2.0) == 0.0


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_constant_confidence_gives_its_distance_from_the_accuracy(share: float) -> None:
    right = np.arange(20) < 20 * share
    for metric in (ece, mce):
        assert metric(np.full(20, 0.55), right) == pytest.approx(abs(share - 0.55))
    assert ace(np.full(20, 0.55), right, bins=1) == pytest.approx(abs(share - 0.55))


def test_certain_and_right_is_perfect_and_certain_and_wrong_is_worst() -> None:
    p = np.eye(3)[[0, 1, 2, 1]]
    for metric in (ece, mce, ace, classwise_ece, tace, brier):
        assert metric(p, [0, 1, 2, 1]) == 0.0
    wrong = np.eye(2)[[0, 1]]
    assert brier(wrong, [1, 0]) == 2.0
    assert ece(wrong, [1, 0]) == mce(wrong, [1, 0]) == 1.0


def test_edges_belong_to_the_bin_below() -> None:
    found = reliability([0.0, 0.2, 0.3, 0.6, 0.7, 1.0], [0, 1, 0, 1, 1, 1])
    assert [b.count for b in found] == [1, 1, 1, 0, 0, 1, 1, 0, 0, 1]
    assert math.isnan(found[3].accuracy) and found[3].gap == 0.0
    assert (found[1].low, found[1].high) == pytest.approx((0.1, 0.2))


def test_equal_mass_bins_hold_the_floor_and_the_last_one_the_rest() -> None:
    p, labels = softmaxed(3, count=17)
    found = reliability(p, labels, bins=5, binning="mass")
    assert [b.count for b in found] == [3, 3, 3, 3, 5]
    assert all(a.high <= b.low for a, b in pairwise(found))
    few = reliability(p[:2], labels[:2], bins=5, binning="mass")
    assert [b.count for b in few] == [1, 1]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 70), st.integers(1, 15), st.booleans())
def test_properties(seed: int, count: int, bins: int, mass: bool) -> None:
    p, labels = softmaxed(seed, count)
    p = p.round(1)  # ties
    p[:, 0] += 1 - p.sum(1)
    p = p.clip(0) / p.clip(0).sum(1, keepdims=True)
    how = "mass" if mass else "width"
    error, worst = ece(p, labels, bins, how), mce(p, labels, bins, how)
    assert 0 <= error <= worst + 1e-12 and worst <= 1
    found = reliability(p, labels, bins, how)
    assert sum(b.count for b in found) == count
    accuracy = sum(b.count * b.accuracy for b in found if b.count) / count
    assert accuracy == pytest.approx((p.argmax(1) == labels).mean())
    # |accuracy - mean confidence| of everything is the error with one bin, and the least there is.
    assert ece(p, labels, 1, how) <= error + 1e-9
    turn = np.random.default_rng(seed).permutation(count)
    for metric in (ece, mce, ace, classwise_ece, tace):
        assert metric(p[turn], labels[turn]) == pytest.approx(metric(p, labels), abs=1e-12)
    assert brier(p[turn], labels[turn]) == pytest.approx(brier(p, labels))


def test_a_calibrated_source_has_a_small_error() -> None:
    random = np.random.default_rng(0)
    confidence = random.uniform(0.5, 1, 200_000)
    right = random.random(200_000) < confidence
    assert ece(confidence, right) < 0.005 and ace(confidence, right) < 0.005
    assert ece(confidence, random.random(200_000) < 0.5) == pytest.approx(0.25, abs=0.01)


def test_tensors_and_confidences_are_the_same_thing() -> None:
    p, labels = softmaxed(5)
    tensors = torch.tensor(p), torch.tensor(labels)
    top = p.max(1), p.argmax(1) == labels
    for metric in (ece, mce, ace):
        assert metric(*tensors) == metric(p, labels) == metric(*top)
    half = torch.tensor(p).bfloat16()
    assert brier(half, labels) == pytest.approx(brier(p, labels), abs=1e-2)


@pytest.mark.parametrize(
    ("probabilities", "labels", "match"),
    [
        ([], [], "one label"),
        ([[0.5, 0.5]], [0, 1], "one label"),
        ([[2.0, -1.0]], [0], "softmax"),
        ([[0.4, 0.4]], [0], "sum to 1"),
        ([[float("nan"), 1.0]], [0], "softmax"),
        ([[0.5, 0.5]], [2], "below 2"),
        ([0.5, 0.6], [0, 3], "0 or 1"),
    ],
)
def test_what_does_not_fit_is_refused(probabilities: list, labels: list, match: str) -> None:
    with pytest.raises(PlaitError, match=match):
        ece(probabilities, labels)


def test_bins_and_forms_are_checked() -> None:
    with pytest.raises(PlaitError, match="bins"):
        ece(THREE, [0, 0, 1], bins=0)
    with pytest.raises(PlaitError, match="binning"):
        mce(THREE, [0, 0, 1], binning="log")  # type: ignore[arg-type]
    with pytest.raises(PlaitError, match=r"\[N, K\]"):
        brier([0.5, 0.6], [0, 1])


@pytest.mark.parametrize("binning", ["width", "mass"])
def test_the_plot_is_written_and_depends_on_the_data(tmp_path, binning) -> None:
    pytest.importorskip("matplotlib")
    p, labels = softmaxed(1)
    path = reliability_plot(tmp_path / "new" / "a.png", p, labels, binning=binning, title="base")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    other = reliability_plot(tmp_path / "b.png", p, (labels + 1) % 4, binning=binning, title="base")
    assert other.read_bytes() != path.read_bytes()
    vector = reliability_plot(tmp_path / "c.svg", p, labels)
    assert "<svg" in vector.read_text()
