"""DELLA and Breadcrumbs against the papers' formulas on dense float64 matrices."""

from __future__ import annotations

import math

import pytest
import torch
from test_merge_kit import IN, OUT, dense, lows, run
from torch import Tensor

from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.merging import get_merge_method
from plait.merging.changes import Changes
from plait.merging.method import make_merge
from plait.merging.methods.della import chances
from plait.merging.spaces import merge_site


def drawn(method: str, low: LowRank, space: str, seeds: int, **options: object) -> Tensor:
    way = make_merge(get_merge_method(method), options)
    sites = (Changes("s", [low], seed=seed) for seed in range(seeds))
    return torch.stack([dense(merge_site(way, site, [1.0], space)) for site in sites])


def test_chances_grow_with_magnitude_around_the_density() -> None:
    block = lows(1)[0].dense()[None]
    q = chances(block, 0.4, 0.15)
    torch.testing.assert_close(q.mean(-1), torch.full((1, OUT), 0.4, dtype=torch.float64))
    for row, chance in zip(block[0], q[0], strict=True):
        by_size = sorted(range(IN), key=lambda c: abs(float(row[c])))
        wanted = [0.25 + 0.3 * place / (IN - 1) for place in range(IN)]
        assert [float(chance[c]) for c in by_size] == pytest.approx(wanted)
    single = chances(block[..., :1], 0.4, 0.1)
    torch.testing.assert_close(single, torch.full_like(single, 0.4))
    wide = torch.arange(5000.0)[None, None]
    assert len(chances(wide, 0.5, 0.25).unique()) == 5000


@pytest.mark.parametrize("space", ["factors", "aligned", "delta"])
def test_della_linear_is_unbiased(space: str) -> None:
    low = lows(1)[0]
    found = drawn("della", low, space, 500, density=0.5, epsilon=0.2, elect=False)
    spread = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - low.dense()).abs() <= 4.5 * spread + 1e-12).all()


def test_entries_stay_as_often_as_their_chances_say() -> None:
    low = lows(1)[0]
    q = chances(low.dense()[None], 0.5, 0.3)[0]
    found = drawn("della", low, "delta", 800, density=0.5, epsilon=0.3, rescale="none")
    share = (found != 0).double().mean(0)
    assert float((share - q).abs().max()) < 4.5 * math.sqrt(0.25 / 800)
    kept = found[0] != 0
    torch.testing.assert_close(found[0][kept], low.dense()[kept])


def test_without_a_span_a_row_has_dare_s_one_chance() -> None:
    found = drawn("della", lows(1)[0], "delta", 300, density=0.3, epsilon=0.0, elect=False)
    share = (found != 0).double().mean()
    assert float(share) == pytest.approx(0.3, abs=0.01)
    exact = lows(1)[0].dense()
    error = (found - exact).square().sum((1, 2)).mean() / exact.square().sum()
    assert float(error) == pytest.approx(0.7 / 0.3, rel=0.05)


def test_della_restores_the_sum_of_magnitudes_where_asked() -> None:
    low = lows(1)[0]
    for block in (1, 1 << 20):
        found = run("della", "delta", [low], [1.0], block=block, density=0.3, rescale="l1")
        torch.testing.assert_close(found.abs().sum(), low.dense().abs().sum())


def test_della_elects_what_is_left() -> None:
    low = lows(1)[0]
    found = run("della", "delta", [low, low * -0.4], [0.5, 0.5], density=1.0, epsilon=0.0)
    torch.testing.assert_close(found, low.dense(), atol=1e-6, rtol=1e-6)
    given = lows(3)
    added = run("della", "delta", given, elect=False, density=1.0, epsilon=0.0)
    wanted = run("linear", "delta", given)
    torch.testing.assert_close(added, wanted, atol=1e-9, rtol=1e-9)


def crumbs_by_hand(m: Tensor, density: float, gamma: float) -> Tensor:
    order = m.abs().flatten().argsort(descending=True)
    kept = int(density * m.numel() + 1e-6)
    top = min(int(gamma * m.numel() + 1e-6), m.numel() - kept)
    out = torch.zeros(m.numel(), dtype=m.dtype)
    chosen = order[top : top + kept]
    out[chosen] = m.flatten()[chosen]
    return out.reshape(m.shape)


@pytest.mark.parametrize(
    ("density", "gamma"), [(0.9, 0.01), (0.5, 0.1), (0.3, 0.0), (0.95, 0.2), (0.6, 0.003)]
)
def test_breadcrumbs_keeps_the_slice_between_two_quantiles(density: float, gamma: float) -> None:
    given = lows(3)
    parts = [crumbs_by_hand(low.dense(), density, gamma) for low in given]
    wanted = sum(w * part for w, part in zip((0.5, -0.3, 0.2), parts, strict=True))
    found = run("breadcrumbs", "delta", given, [0.5, -0.3, 0.2], density=density, gamma=gamma)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    alone = run("breadcrumbs", "delta", given[:1], [1.0], density=density, gamma=gamma)
    assert int((alone != 0).sum()) == int(density * OUT * IN + 1e-6)


def test_breadcrumbs_with_election_is_ties_where_no_outlier_goes() -> None:
    given = lows(3)
    found = run("breadcrumbs", "delta", given, density=0.4, gamma=0.0, elect=True)
    assert torch.equal(found, run("ties", "delta", given, density=0.4))
    fewer = run("breadcrumbs", "delta", given, density=0.4, gamma=0.1, elect=True)
    assert not torch.allclose(found, fewer)


def test_impossible_shares_are_refused() -> None:
    for options in ({"density": 0.1}, {"density": 0.95}, {"epsilon": -0.1}):
        with pytest.raises(PlaitError, match="density"):
            run("della", "delta", lows(2), **options)
    with pytest.raises(PlaitError, match="gamma"):
        run("breadcrumbs", "delta", lows(2), gamma=1.0)
    with pytest.raises(PlaitError, match="not in 'factors'"):
        from plait.merging.method import choose_space

        choose_space("della", make_merge(get_merge_method("della"), {}), "factors")
