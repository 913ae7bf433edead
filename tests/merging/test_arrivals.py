"""OPCM and MWA against dense float64 matrices and the papers' formulas."""

from __future__ import annotations

import io
import math

import pytest
import torch
from test_merge_kit import IN, OUT, dense, lows, run
from torch import Tensor

from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.merging.methods.opcm import Arrivals


def close(found: LowRank | Tensor, wanted: Tensor, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(dense(found), wanted, atol=tolerance, rtol=tolerance)


def opcm_by_hand(models: list[dict[str, Tensor]], ranks: dict[str, list[int]], alpha: float):
    """The paper's steps on matrices, the masks limited to the rank that is there."""

    def norm(model: dict[str, Tensor]) -> float:
        return math.sqrt(sum(float(m.square().sum()) for m in model.values()))

    merged, scale, norms = models[0], 1.0, [norm(models[0])]
    for t, model in enumerate(models[1:], 1):
        total = {}
        for name, m in model.items():
            U, S, Vh = torch.linalg.svd(merged[name])
            r = min(sum(ranks[name][:t]), OUT, IN)
            split = int(torch.nonzero(S[:r].cumsum(0) > alpha * S[:r].sum())[0])
            P = U.mT @ m @ Vh.mT
            for i in range(r):
                P[i, i] = 0
            P[:split, :split] = 0
            total[name] = scale * merged[name] + U @ P @ Vh
        norms.append(norm(model))
        scale = norm(total) / (sum(norms) / len(norms))
        merged = {name: m / scale for name, m in total.items()}
    return merged


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9])
def test_arrivals_are_the_paper_s_steps_over_the_whole_model(alpha: float) -> None:
    one, two = lows(3), [low * (1.0 + i) for i, low in enumerate(lows(3, seed=7))]
    models = [{"a": x, "b": y} for x, y in zip(one, two, strict=True)]
    so_far = Arrivals(alpha)
    for model in models:
        so_far.add(model)
    matrices = [{name: low.dense() for name, low in model.items()} for model in models]
    wanted = opcm_by_hand(matrices, {"a": [3, 2, 4], "b": [3, 2, 4]}, alpha)
    for name, low in so_far.merged.items():
        close(low, wanted[name])
        assert low.rank <= 9
    norms = [math.sqrt(sum(float(m.norm()) ** 2 for m in model.values())) for model in models]
    total = math.sqrt(sum(float(low.norm()) ** 2 for low in so_far.merged.values()))
    assert total == pytest.approx(sum(norms) / 3, rel=1e-9)


def test_the_method_takes_inputs_in_order_site_by_site() -> None:
    given = lows(3)
    wanted = opcm_by_hand([{"a": low.dense()} for low in given], {"a": [3, 2, 4]}, 0.5)
    close(run("opcm", "factors", given, [1 / 3] * 3), wanted["a"])
    other = dense(run("opcm", "factors", given[::-1], [1 / 3] * 3))
    assert float((other - wanted["a"]).norm() / other.norm()) > 0.1
    heavier = [given[0] * 1.5, given[1] * 0.9, given[2] * 0.6]
    close(
        run("opcm", "factors", given),
        dense(run("opcm", "factors", heavier, [1 / 3] * 3)),
    )


def test_what_is_added_lies_outside_what_is_occupied() -> None:
    first, second = lows(2)
    so_far = Arrivals(alpha=0.7)
    so_far.add({"a": first})
    close(so_far.merged["a"], first.dense())
    so_far.add({"a": second})
    added = so_far.scale * so_far.merged["a"].dense() - first.dense()
    U, S, Vh = torch.linalg.svd(first.dense())
    P = U.mT @ added @ Vh.mT
    assert float(P.diagonal()[:3].abs().max()) < 1e-8
    split = int((S[:3].cumsum(0) <= 0.7 * S[:3].sum()).sum())
    assert 0 < split < 3
    assert float(P[:split, :split].abs().max()) < 1e-8
    full = Arrivals(alpha=1.0)
    full.add({"a": first})
    full.add({"a": second})
    rest = U.mT @ (full.scale * full.merged["a"].dense() - first.dense()) @ Vh.mT
    assert float(rest[:3, :3].abs().max()) < 1e-8


def test_what_is_orthogonal_is_added_whole_and_what_is_alike_not_at_all() -> None:
    eye = torch.eye(8, dtype=torch.float64)
    one, two = LowRank(eye[:, :2], eye[:2]), LowRank(eye[:, 2:5] * 2, eye[2:5])
    so_far = Arrivals()
    so_far.add({"a": one})
    so_far.add({"a": two})
    close(so_far.scale * so_far.merged["a"].dense(), one.dense() + two.dense())
    low = lows(1)[0]
    alike = Arrivals()
    for factor in (1.0, 3.0, 2.0):
        alike.add({"a": low * factor})
    close(alike.merged["a"], 2.0 * low.dense())


def test_twenty_arrivals_take_no_more_memory_than_two_and_resume_from_a_file() -> None:
    so_far, sizes = Arrivals(most=6), []
    for i in range(20):
        so_far.add({"a": lows(3, seed=i)[i % 3]})
        sizes.append(so_far.merged["a"].B.numel() + so_far.merged["a"].A.numel())
        if i == 9:
            file = io.BytesIO()
            torch.save(so_far.state(), file)
            file.seek(0)
            so_far = Arrivals.resume(torch.load(file, weights_only=True))
    assert max(sizes) == sizes[3] == 6 * (OUT + IN)
    assert 0 < so_far.dropped["a"] < 1 and so_far.count == 20
    whole = Arrivals(most=6)
    for i in range(20):
        whole.add({"a": lows(3, seed=i)[i % 3]})
    close(so_far.merged["a"], whole.merged["a"].dense())


def test_sites_may_be_missing_and_new() -> None:
    a, b, c = lows(3)
    so_far = Arrivals()
    so_far.add({"x": a})
    so_far.add({"y": b, "x": LowRank(c.B[:, :0], c.A[:0])})
    assert set(so_far.merged) == {"x", "y"}
    total = math.sqrt(float(a.norm()) ** 2 + float(b.norm()) ** 2)
    mean = (float(a.norm()) + float(b.norm())) / 2
    close(so_far.merged["y"], b.dense() * mean / total)
    before = dict(so_far.merged)
    so_far.add({})
    assert so_far.merged == before and so_far.count == 2
    with pytest.raises(PlaitError, match="alpha"):
        run("opcm", "factors", [a, b], alpha=1.5)


@pytest.mark.parametrize("space", ["factors", "delta"])
@pytest.mark.parametrize("kind", ["loss", "steps"])
@pytest.mark.parametrize("form", ["power", "exponential"])
def test_metrics_become_weights(space: str, kind: str, form: str) -> None:
    given, metric, p = lows(3), [0.9, 1.7, 1.2], 2.0
    if form == "power":
        raw = [m**p if kind == "steps" else (1 / m) ** p for m in metric]
    elif kind == "steps":
        raw = [math.exp(p * m / 1.7) for m in metric]
    else:
        raw = [math.exp(-p * (m - 0.9) / 0.8) for m in metric]
    wanted = sum(v / sum(raw) * low.dense() for v, low in zip(raw, given, strict=True))
    options = {"metric": metric, "penalty": p, "kind": kind, "form": form}
    close(run("mwa", space, given, [1 / 3] * 3, **options), wanted)


def test_no_penalty_is_the_mean_and_a_great_one_the_best() -> None:
    given = lows(3)
    mean = sum(low.dense() for low in given) / 3
    close(run("mwa", "factors", given, [1 / 3] * 3, metric=[3, 1, 2], penalty=0), mean)
    best = run("mwa", "factors", given, [1 / 3] * 3, metric=[3, 1, 2], penalty=1000)
    close(best, given[1].dense())
    last = run("mwa", "factors", given, [1 / 3] * 3, metric=[3, 1, 2], penalty=1000, kind="steps")
    close(last, given[0].dense())
    a, b = (dense(run("mwa", "factors", given, metric=[3 * s, s, 2 * s])) for s in (1.0, 50.0))
    close(a, b)
    for options, message in (
        ({"metric": [1.0, 2.0]}, "2 metrics for 3"),
        ({"metric": [1.0, 2.0, 0.0]}, "above 0"),
        ({"penalty": -1.0}, "penalty"),
    ):
        with pytest.raises(PlaitError, match=message):
            run("mwa", "factors", given, **options)
