"""What mergekit's merge files may ask of the methods: an option for each input, elected sums."""

from __future__ import annotations

import pytest
import torch
from test_merge_kit import dense, lows, run
from torch import Tensor

from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.merging import get_merge_method
from plait.merging.changes import Changes
from plait.merging.method import make_merge
from plait.merging.spaces import merge_site


def trimmed(delta: Tensor, density: float, gamma: float) -> Tensor:
    """Without the largest gamma and the smallest entries, by a full sort."""
    order = delta.abs().flatten().argsort(descending=True)
    kept = int(density * delta.numel())
    out = min(int(gamma * delta.numel()), delta.numel() - kept)
    made = torch.zeros(delta.numel(), dtype=delta.dtype)
    made[order[out : out + kept]] = delta.flatten()[order[out : out + kept]]
    return made.view_as(delta)


def elected_sum(deltas: list[Tensor], weights: list[float]) -> Tensor:
    weighted = torch.stack([w * d for w, d in zip(weights, deltas, strict=True)])
    sign = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    return torch.where(weighted.sign() == sign, weighted, 0).sum(0)


def test_breadcrumbs_take_density_and_gamma_of_each_input_and_an_elected_sum() -> None:
    given, weights = lows(3), [0.7, 0.4, 0.3]
    shares, gammas = [0.7, 0.5, 1.0], [0.1, 0.2, 0.0]
    parts = [
        trimmed(low.dense(), share, gamma)
        for low, share, gamma in zip(given, shares, gammas, strict=True)
    ]
    found = run("breadcrumbs", "delta", given, weights, density=shares, gamma=gammas)
    torch.testing.assert_close(found, sum(w * p for w, p in zip(weights, parts, strict=True)))
    options = {"density": shares, "gamma": gammas, "elect": True, "reduce": "sum"}
    found = run("breadcrumbs", "delta", given, weights, **options)
    torch.testing.assert_close(found, elected_sum(parts, weights))


@pytest.mark.parametrize("space", ["factors", "delta"])
def test_della_takes_density_and_epsilon_of_each_input(space: str) -> None:
    given, weights = lows(3), [0.7, 0.4, 0.3]
    options = {"density": [0.5, 0.3, 1.0], "epsilon": [0.1, 0.2, 0.0], "elect": False}
    found = dense(run("della", space, given, weights, **options))
    alone = [0.0 if i != 2 else weights[2] for i in range(3)]
    whole = dense(run("della", space, given, alone, **options))
    torch.testing.assert_close(whole, weights[2] * given[2].dense())
    same = {"density": 0.5, "epsilon": 0.1, "elect": False}
    each = {"density": [0.5] * 3, "epsilon": [0.1] * 3, "elect": False}
    torch.testing.assert_close(
        dense(run("della", space, given, weights, **same)),
        dense(run("della", space, given, weights, **each)),
    )
    first = dense(run("della", space, given, [1.0, 0.0, 0.0], **same))
    torch.testing.assert_close(first, dense(run("della", space, given, [1.0, 0.0, 0.0], **options)))
    assert float((found - whole).norm()) > 0
    with pytest.raises(PlaitError, match=r"density -\+ epsilon"):
        run("della", space, given, weights, density=[0.5, 0.1, 0.5], epsilon=0.2)


def test_della_s_elected_sum() -> None:
    given, weights = lows(3), [0.7, 0.4, 0.3]
    options = {"density": 1.0, "epsilon": 0.0, "reduce": "sum"}
    found = run("della", "delta", given, weights, **options)
    torch.testing.assert_close(found, elected_sum([low.dense() for low in given], weights))


def test_model_stock_unclipped_turns_opposing_changes_round() -> None:
    a, b = lows(2)
    given = [a, a * -0.5 + b * 0.1]
    one, two = (low.dense() for low in given)
    cosine = float((one * two).sum() / (one.norm() * two.norm()))
    assert cosine < 0
    t = 2 * cosine / (1 + cosine)
    found = run("model-stock", "delta", given, [0.5, 0.5], clip=False)
    torch.testing.assert_close(found, t * (one + two) / 2)
    assert not run("model-stock", "delta", given, [0.5, 0.5]).any()


def test_nearswap_is_the_interpolation_that_it_is_described_as() -> None:
    low = lows(1)[0]
    delta, t = low.dense(), 0.4
    wanted = delta * (t / delta.abs()).clamp(0, 1)
    torch.testing.assert_close(run("nearswap", "delta", [low], [1.0], t=t), wanted)
    assert not run("nearswap", "delta", [low], [1.0], t=0.0).any()
    with pytest.raises(PlaitError, match="t is a size"):
        run("nearswap", "delta", [low], [1.0], t=-1.0)


@pytest.mark.parametrize("space", ["factors", "delta"])
def test_dare_restores_sums_also_where_only_zeros_stay(space: str) -> None:
    """Of one entry that is not 0 and may go: no factor makes up for it, and none is infinite."""
    low = lows(1)[0]
    B, A = torch.zeros_like(low.B), torch.zeros_like(low.A)
    B[0, 0], A[0, 0] = 1.0, 1.0
    one = LowRank(B.float(), A.float())
    for seed in range(6):
        way = make_merge(get_merge_method("dare"), {"density": 0.1, "rescale": "l1"})
        found = dense(merge_site(way, Changes("s", [one], seed=seed), [1.0], space))
        assert torch.isfinite(found).all()
