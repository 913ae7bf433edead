"""Every merge method, in every space that it has, through what all merges must do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from plait.linalg import LowRank
from plait.merging import get_merge_method, merge_method_names
from plait.merging.changes import Changes
from plait.merging.method import make_merge
from plait.merging.spaces import merge_site

OUT, IN = 14, 18
RANKS = (3, 2, 4)
WEIGHTS = (0.5, 0.3, 0.2)


def lows(k: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[LowRank]:
    g = torch.Generator().manual_seed(seed)
    made = []
    for i in range(k):
        r = RANKS[i % len(RANKS)]
        B, A = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((OUT, r), (r, IN)))
        made.append(LowRank(B.to(dtype), A.to(dtype), 0.7 + i))
    return made


def planted(needs: frozenset[str], order: list[int]) -> list[Tensor] | None:
    """Statistics that a method asks for; the input numbered i always has the same ones."""
    if not needs:
        return None
    made = []
    for i in order:
        g = torch.Generator().manual_seed(100 + i)
        x = torch.randn(40, IN, generator=g, dtype=torch.float64)
        squares = torch.rand(OUT, IN, generator=g, dtype=torch.float64)
        made.append({"gram": x.mT @ x / 40, "fisher": squares}[next(iter(needs))])
    return made


def base_weight() -> Tensor:
    """W0 of the site, for methods that declare that they read it."""
    g = torch.Generator().manual_seed(50)
    return torch.randn(OUT, IN, generator=g, dtype=torch.float64)


def run(
    name: str, space: str, given: list[LowRank], weights=None, block=1 << 20, order=None, **options
):
    method = get_merge_method(name)
    way = make_merge(method, options)
    k = len(given)
    weights = list(WEIGHTS[:k]) if weights is None else weights
    seen = planted(way.needs, order or list(range(k)))
    W = base_weight() if way.reads_base else None
    changes = Changes("site", given, seed=3, block=block, statistics=seen, original=W)
    return merge_site(way, changes, weights, space)


def dense(found: LowRank | Tensor) -> Tensor:
    return found.dense() if isinstance(found, LowRank) else found


def cases() -> list[tuple[str, str]]:
    found = [(name, get_merge_method(name)) for name in merge_method_names()]
    return [(name, space) for name, m in found for space in make_merge(m, {}).spaces]


def count(name: str) -> int:
    return get_merge_method(name).inputs or 3


def turned(low: LowRank, seed: int) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    G = torch.randn(low.rank, low.rank, generator=g, dtype=torch.float64)
    G = G + 3 * torch.eye(low.rank, dtype=torch.float64)
    return LowRank(low.B @ G, torch.linalg.inv(G) @ low.A, low.scale)


@pytest.mark.parametrize(("name", "space"), cases())
def test_turning_the_factors_of_an_input_changes_nothing(name: str, space: str) -> None:
    given = lows(count(name))
    other = [turned(low, i) for i, low in enumerate(given)]
    a, b = dense(run(name, space, given)), dense(run(name, space, other))
    torch.testing.assert_close(a, b, atol=1e-7 * float(a.abs().max()), rtol=1e-6)


@pytest.mark.parametrize(("name", "space"), cases())
def test_copies_with_weights_that_add_up_to_one_return_the_input(name: str, space: str) -> None:
    method = get_merge_method(name)
    low = lows(1)[0]
    given = [low, turned(low, 1), turned(low, 2)][: count(name)]
    weights = list(WEIGHTS[: len(given)])
    weights[-1] += 1 - sum(weights)
    found = dense(run(name, space, given, weights, **method.whole))
    torch.testing.assert_close(found, low.dense(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("name", "space"), cases())
def test_the_order_of_the_inputs_does_not_matter(name: str, space: str) -> None:
    if not get_merge_method(name).symmetric:
        pytest.skip("declared to depend on the order")
    given = lows(count(name))
    weights = list(WEIGHTS[: len(given)])
    order = [2, 0, 1] if len(given) == 3 else [1, 0]
    a = dense(run(name, space, given, weights))
    turned_round = [given[i] for i in order], [weights[i] for i in order]
    b = dense(run(name, space, *turned_round, order=order))
    torch.testing.assert_close(a, b, atol=1e-7 * float(a.abs().max()), rtol=1e-6)


@pytest.mark.parametrize(("name", "space"), cases())
def test_blocks_do_not_show(name: str, space: str) -> None:
    given = lows(count(name))
    a, b = dense(run(name, space, given)), dense(run(name, space, given, block=1))
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("name", "space"), cases())
def test_inputs_that_do_not_act_here_and_zeros_are_harmless(name: str, space: str) -> None:
    given = lows(count(name))
    none = LowRank(given[0].B[:, :0], given[0].A[:0])
    for absent in (none, given[0] * 0.0):
        found = dense(run(name, space, [absent, *given[1:]]))
        assert torch.isfinite(found).all() and found.shape == (OUT, IN)
    nothing = dense(run(name, space, [none] * len(given)))
    assert nothing.shape == (OUT, IN) and not nothing.any()


@pytest.mark.parametrize(("name", "space"), cases())
def test_float32_goes_in_and_comes_out(name: str, space: str) -> None:
    wide = dense(run(name, space, lows(count(name))))
    found = dense(run(name, space, lows(count(name), dtype=torch.float32)))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wide, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("name", "space"), cases())
def test_factors_stay_of_low_rank(name: str, space: str) -> None:
    if space == "delta":
        pytest.skip("of full rank until it is cut")
    given = lows(count(name))
    found = run(name, space, given)
    assert isinstance(found, LowRank) and found.rank <= sum(low.rank for low in given)
