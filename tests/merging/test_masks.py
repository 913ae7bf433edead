"""KnOTS, Consensus, EMR and Twin-Merging against dense float64 matrices."""

from __future__ import annotations

import pytest
import torch
from test_merge_kit import IN, OUT, dense, lows, run
from torch import Tensor

from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.merging import get_merge_method
from plait.merging.method import make_merge
from plait.merging.methods.twin import parts
from plait.merging.spaces import align

WEIGHTS = [0.5, 0.3, 0.2]


def close(found: LowRank | Tensor, wanted: Tensor, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(dense(found), wanted, atol=tolerance, rtol=tolerance)


def disjoint() -> list[LowRank]:
    """Three changes of different entries: rows 0-3, 4-8 and 9-13."""
    made = []
    for low, rows in zip(lows(3), (range(4), range(4, 9), range(9, OUT)), strict=True):
        mask = torch.zeros(OUT, 1, dtype=torch.float64)
        mask[list(rows)] = 1
        made.append(LowRank(low.B * mask, low.A, low.scale))
    return made


def test_the_joint_basis_holds_every_input() -> None:
    given = lows(3)
    U, coordinates = align(given)
    torch.testing.assert_close(U.mT @ U, torch.eye(9, dtype=torch.float64))
    for low, C in zip(given, coordinates, strict=True):
        close(U @ C, low.dense())


@pytest.mark.parametrize("side", ["outputs", "inputs"])
def test_knots_merges_the_coordinates_of_a_dense_svd(side: str) -> None:
    given = lows(3)
    matrices = [low.dense() if side == "outputs" else low.dense().mT for low in given]
    U, S, _ = torch.linalg.svd(torch.cat(matrices, 1), full_matrices=False)
    U = U[:, 1e-8 * S[0] < S]
    parts_ = torch.stack([U.mT @ m for m in matrices])
    count = int(0.25 * parts_[0].numel() + 1e-6)
    kept = []
    for w, C in zip(WEIGHTS, parts_, strict=True):
        least = C.abs().flatten().topk(count).values[-1]
        kept.append(w * torch.where(C.abs() >= least, C, 0))
    sign = torch.where(sum(kept) >= 0, 1.0, -1.0)
    agree = [k.sign() == sign for k in kept]
    mass = sum(w * a for w, a in zip(WEIGHTS, agree, strict=True)).clamp_min(1e-12)
    merged = U @ (sum(torch.where(a, k, 0) for a, k in zip(agree, kept, strict=True)) / mass)
    found = run("knots", "factors", given, side=side, scale=0.6, options={"density": 0.25})
    close(found, 0.6 * (merged if side == "outputs" else merged.mT), 1e-6)


def test_knots_takes_any_method_of_coordinates_and_no_other() -> None:
    given = lows(3)
    options = {"density": 0.6, "elect": False}
    options["epsilon"] = 0.1
    found = run("knots", "factors", given, inner="della", options=options)
    close(found, dense(run("della", "aligned", given, **options)))
    with pytest.raises(PlaitError, match="'aligned'"):
        run("knots", "factors", given, inner="slerp")
    with pytest.raises(PlaitError, match="density"):
        run("knots", "factors", given, options={"densty": 0.3})


def test_knots_hands_statistics_to_a_method_that_asks_for_some() -> None:
    given = lows(3)
    assert "aligned" in make_merge(get_merge_method("fisher"), {}).spaces
    found = run("knots", "factors", given, inner="fisher")
    close(found, dense(run("fisher", "aligned", given)))
    with pytest.raises(PlaitError, match="side='outputs'"):
        run("knots", "factors", given, inner="fisher", side="inputs")


def consensus_by_hand(matrices: list[Tensor], threshold: float, agreement: int) -> Tensor:
    out, total = torch.zeros(OUT, IN, dtype=torch.float64), sum(matrices)
    for i in range(OUT):
        for j in range(IN):
            used = [abs(m[i, j]) > threshold * abs(total[i, j] - m[i, j]) for m in matrices]
            out[i, j] = total[i, j] if sum(map(bool, used)) >= agreement else 0
    return out


@pytest.mark.parametrize(("threshold", "agreement"), [(0.2, 2), (0.6, 2), (0.4, 3), (1.5, 1)])
def test_consensus_is_the_paper_s(threshold: float, agreement: int) -> None:
    given = lows(3)
    wanted = consensus_by_hand([low.dense() for low in given], threshold, agreement)
    found = run(
        "consensus-ta", "delta", given, [1 / 3] * 3, threshold=threshold, agreement=agreement
    )
    close(3 * found, wanted)
    assert 0 < int((wanted == 0).sum()) < wanted.numel()


def test_consensus_of_all_of_none_and_of_disjoint_changes() -> None:
    given = lows(3)
    plain = run("linear", "delta", given)
    close(run("consensus-ta", "delta", given, agreement=0), plain)
    assert not run("consensus-ta", "delta", given, agreement=4).any()
    apart = disjoint()
    assert not run("consensus-ta", "delta", apart).any()
    for i, low in enumerate(apart):
        close(run("consensus-ta", "delta", apart, [1.0] * 3, input=i), low.dense())
    alone = run("consensus-ta", "delta", given[:1], [1.0], agreement=1)
    close(alone, given[0].dense())
    kept = [
        int((run("consensus-ta", "delta", given, threshold=t, input=1) != 0).sum())
        for t in (0.0, 0.2, 0.6, 2.0, 9.0)
    ]
    assert kept == sorted(kept, reverse=True) and kept[0] == OUT * IN > kept[-1]
    with pytest.raises(PlaitError, match="no input 3"):
        run("consensus-ta", "delta", given, input=3)


def emr_by_hand(matrices: list[Tensor], task: int | None) -> Tensor:
    sign = torch.where(sum(matrices) >= 0, 1, -1)
    whole = sign * torch.stack([torch.where(m * sign > 0, m.abs(), 0) for m in matrices]).amax(0)
    if task is None:
        return whole
    mask = matrices[task] * sign > 0
    return matrices[task].abs().sum() / (mask * whole).abs().sum() * mask * whole


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_emr_is_the_paper_s(block: int) -> None:
    given = lows(3)
    matrices = [low.dense() for low in given]
    for task in (None, 0, 1, 2):
        found = run("emr", "delta", given, [1 / 3] * 3, block=block, input=task)
        close(found, emr_by_hand(matrices, task))


def test_emr_gives_back_copies_disjoint_changes_and_one_alone() -> None:
    low, apart = lows(1)[0], disjoint()
    for i in range(3):
        close(run("emr", "delta", apart, input=i), apart[i].dense())
        close(run("emr", "delta", [low] * 3, input=i), low.dense())
        close(run("emr", "aligned", [low] * 3, input=i), low.dense())
    close(run("emr", "delta", [low], [1.0], input=0), low.dense())
    close(run("emr", "delta", [low, low], [1.0, -0.5], input=0), low.dense())
    with pytest.raises(PlaitError, match="no input"):
        run("emr", "delta", [low], [1.0], input=1)


def test_emr_comes_closer_to_each_input_than_the_mean_does() -> None:
    given = lows(3)
    mean = sum(low.dense() for low in given) / 3
    for i, low in enumerate(given):
        rebuilt = run("emr", "delta", given, [1 / 3] * 3, input=i)
        error = (rebuilt - low.dense()).norm() / low.norm()
        assert float(error) < float((mean - low.dense()).norm() / low.norm())


def test_twin_adds_the_best_residual_that_a_gate_asks_for() -> None:
    given = lows(3)
    matrices = [low.dense() for low in given]
    shared = sum(w * m for w, m in zip(WEIGHTS, matrices, strict=True))
    close(run("twin", "factors", given), shared)
    for i, m in enumerate(matrices):
        gates = [1.0 if j == i else 0.0 for j in range(3)]
        close(run("twin", "factors", given, gates=gates, residual=9), m)
        close(run("twin", "factors", given, gates=gates, residual=0), shared)
    wanted = shared
    for gate, m in zip((0.2, 0.0, 0.8), matrices, strict=True):
        U, S, Vh = torch.linalg.svd(m - shared)
        wanted = wanted + gate * (U[:, :2] * S[:2]) @ Vh[:2]
    found = run("twin", "factors", given, gates=(0.2, 0.0, 0.8), residual=2)
    close(found, wanted)
    assert found.rank <= 9
    with pytest.raises(PlaitError, match="2 gates for 3"):
        run("twin", "factors", given, gates=(1.0, 0.0))


def test_twin_s_parts_say_what_they_lack() -> None:
    given = lows(3)
    shared, residuals, dropped = parts(given, WEIGHTS, 2)
    for low, residual, share in zip(given, residuals, dropped, strict=True):
        exact = low.dense() - shared.dense()
        lost = (exact - residual.dense()).square().sum() / exact.square().sum()
        assert residual.rank == 2 and float(lost) == pytest.approx(share, rel=1e-8)
