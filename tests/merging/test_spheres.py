"""Merges by angles, and SCE, against dense float64 matrices."""

from __future__ import annotations

import math

import pytest
import torch
from test_merge_kit import IN, OUT, dense, lows, run
from torch import Tensor

from plait.errors import PlaitError
from plait.linalg import LowRank

WEIGHTS = [0.5, 0.3, 0.2]


def close(found: LowRank | Tensor, wanted: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(dense(found), wanted, atol=tolerance, rtol=tolerance)


def arc(a: Tensor, b: Tensor, t: float, interpolated: bool) -> Tensor:
    angle = torch.arccos(a @ b / (a.norm() * b.norm()))
    one, two = ((1 - t) * angle).sin() / angle.sin(), (t * angle).sin() / angle.sin()
    if not interpolated:
        return one * a + two * b
    return ((1 - t) * a.norm() + t * b.norm()) * (one * a / a.norm() + two * b / b.norm())


@pytest.mark.parametrize("space", ["factors", "delta"])
@pytest.mark.parametrize("method", ["slerp", "nuslerp"])
def test_every_row_or_column_turns_by_its_own_angle(method: str, space: str) -> None:
    one, two = lows(2)
    x, y = one.dense(), two.dense()
    pairs = zip(x, y, strict=True)
    wanted = torch.stack([arc(a, b, 0.3, method == "slerp") for a, b in pairs])
    close(run(method, space, [one, two], [0.7, 0.3], along="rows"), wanted)
    pairs = zip(x.mT, y.mT, strict=True)
    wanted = torch.stack([arc(a, b, 0.3, method == "slerp") for a, b in pairs], 1)
    for block in (1, 1 << 20):
        found = run(method, space, [one, two], [1.4, 0.6], along="columns", block=block)
        close(found, wanted)


def test_nuslerp_of_opposite_lines_is_straight_and_ends_are_the_inputs() -> None:
    one, two = lows(2)
    close(run("nuslerp", "factors", [one, -one], [0.75, 0.25]), 0.5 * one.dense())
    close(run("nuslerp", "factors", [one, two], [1.0, 0.0]), one.dense())
    close(run("nuslerp", "factors", [one, two], [0.0, 1.0]), two.dense())


def karcher_by_hand(vectors: list[Tensor], weights: list[float]) -> Tensor:
    """Gradient steps of half the length, from the first vector, on the sphere itself."""
    units = [v / v.norm() for v in vectors]
    u = units[0]
    for _ in range(400):
        step = torch.zeros_like(u)
        for w, v in zip(weights, units, strict=True):
            angle = torch.arccos((u @ v).clamp(-1, 1))
            if angle > 1e-9:
                step += w * angle / angle.sin() * (v - angle.cos() * u)
        step *= 0.5
        length = step.norm()
        if length < 1e-14:
            break
        u = length.cos() * u + length.sin() * step / length
        u = u / u.norm()
    return u * sum(w * v.norm() for w, v in zip(weights, vectors, strict=True))


@pytest.mark.parametrize("space", ["factors", "delta"])
def test_karcher_is_where_gradient_steps_on_the_sphere_end(space: str) -> None:
    given = lows(3)
    matrices = [low.dense() for low in given]
    whole = karcher_by_hand([m.flatten() for m in matrices], WEIGHTS).reshape(OUT, IN)
    close(run("karcher", space, given, WEIGHTS), whole, 1e-7)
    rows = [karcher_by_hand([m[i] for m in matrices], WEIGHTS) for i in range(OUT)]
    close(run("karcher", space, given, WEIGHTS, along="rows"), torch.stack(rows), 1e-7)


def test_karcher_of_two_is_slerp_and_of_opposites_their_sum() -> None:
    for weights in ([0.5, 0.5], [0.2, 0.8]):
        a = dense(run("karcher", "factors", lows(2), weights))
        close(run("slerp", "factors", lows(2), weights), a)
    low = lows(1)[0]
    close(run("karcher", "factors", [low, -low * 0.5], [0.5, 0.5]), 0.25 * low.dense())
    doubled = dense(run("karcher", "factors", lows(3), [1.0, 0.6, 0.4]))
    close(run("karcher", "factors", lows(3), WEIGHTS), doubled / 2)
    with pytest.raises(PlaitError, match="0 or more"):
        run("karcher", "factors", lows(2), [1.0, -0.5])


def stock_by_hand(matrices: list[Tensor]) -> float:
    k = len(matrices)
    flat = [m.flatten() / m.norm() for m in matrices]
    pairs = [float(flat[i] @ flat[j]) for i in range(k) for j in range(i)]
    c = max(0.0, sum(pairs) / len(pairs))
    return k * c / (1 + (k - 1) * c)


def test_model_stock_shrinks_the_mean_by_the_angles() -> None:
    shared, *others = lows(4)
    given = [shared + other * 0.5 for other in others]
    matrices = [low.dense() for low in given]
    mean, t = sum(matrices) / 3, stock_by_hand(matrices)
    assert 0.2 < t < 0.99
    for space in ("factors", "delta"):
        close(run("model-stock", space, given, [1 / 3] * 3), t * mean)
        rows = [stock_by_hand([m[i] for m in matrices]) * mean[i] for i in range(OUT)]
        close(run("model-stock", space, given, [1 / 3] * 3, along="rows"), torch.stack(rows))


def test_model_stock_of_unrelated_or_opposing_changes_is_the_base() -> None:
    eye = torch.eye(6, dtype=torch.float64)
    parts = [LowRank(eye[:, i : i + 2], eye[i : i + 2]) for i in (0, 2, 4)]
    assert not dense(run("model-stock", "factors", parts)).any()
    low = lows(1)[0]
    assert not dense(run("model-stock", "factors", [low, -low * 0.5])).any()
    with pytest.raises(PlaitError, match="two inputs"):
        run("model-stock", "factors", [low], [1.0])


def sce_by_hand(matrices: list[Tensor], weights: list[float], density: float) -> Tensor:
    variance = torch.stack(matrices).var(0, correction=0)
    count = int(density * variance.numel() + 1e-6)
    mask = variance >= variance.flatten().sort(descending=True).values[count - 1]
    energy = [float((m * mask).square().sum()) for m in matrices]
    out = torch.zeros_like(matrices[0])
    for i in range(OUT):
        for j in range(IN):
            values = [float(m[i, j]) for m in matrices]
            sign = 1 if sum(w * v for w, v in zip(weights, values, strict=True)) >= 0 else -1
            agree = [
                (w * e, v)
                for w, e, v in zip(weights, energy, values, strict=True)
                if v * sign > 0 and mask[i, j]
            ]
            if agree:
                out[i, j] = sum(w * v for w, v in agree) / sum(w for w, _ in agree)
    return out


@pytest.mark.parametrize("density", [0.1, 0.4, 1.0])
def test_sce_is_the_paper_s_entry_by_entry(density: float) -> None:
    given = lows(3)
    wanted = sce_by_hand([low.dense() for low in given], WEIGHTS, density)
    close(run("sce", "delta", given, WEIGHTS, density=density), wanted, 1e-6)
    with pytest.raises(PlaitError, match="share"):
        run("sce", "delta", given, density=0.0)


def test_sce_s_weights_follow_the_energy() -> None:
    low = lows(1)[0]
    found = run("sce", "delta", [low, low * 3.0], [0.5, 0.5], density=1.0)
    close(found, (1 * 1 + 9 * 3) / 10 * low.dense(), 1e-6)
    assert math.isclose(float(found.norm()), 2.8 * float(low.norm()), rel_tol=1e-6)
