"""The allocator against brute force, and against the choice of components by their scores."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.linalg.allocate import allocate, best_components

numbers = st.integers(0, 20).map(float)


def brute(worth, price, budget):
    best = -1.0
    for pick in itertools.product(*(range(len(w)) for w in worth.values())):
        cost = sum(price[s][i] for s, i in zip(worth, pick, strict=True))
        if cost <= budget:
            best = max(best, sum(worth[s][i] for s, i in zip(worth, pick, strict=True)))
    return best


def concave(gains):
    return list(itertools.accumulate(sorted(gains, reverse=True), initial=0.0))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(numbers, min_size=0, max_size=4), min_size=1, max_size=4), st.integers(0, 9)
)
def test_it_is_the_optimum_where_every_step_pays_less_than_the_one_before(gains, budget):
    worth = {str(i): concave(g) for i, g in enumerate(gains)}
    price = {s: list(range(len(w))) for s, w in worth.items()}
    chosen = allocate(worth, budget)
    assert sum(chosen.values()) <= budget
    total = sum(worth[s][i] for s, i in chosen.items())
    assert total == pytest.approx(brute(worth, price, budget))


option = st.tuples(st.integers(1, 6), numbers)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=3), st.integers(4, 30)
)
def test_any_worths_and_prices_cost_at_most_one_step_of_the_optimum(sites, budget):
    price = {str(i): list(itertools.accumulate(p for p, _ in o)) for i, o in enumerate(sites)}
    worth = {str(i): [w for _, w in o] for i, o in enumerate(sites)}
    if sum(p[0] for p in price.values()) > budget:
        with pytest.raises(ValueError, match="short of"):
            allocate(worth, budget, price)
        return
    chosen = allocate(worth, budget, price)
    assert sum(price[s][i] for s, i in chosen.items()) <= budget
    total = sum(worth[s][i] for s, i in chosen.items())
    step = max(max(w) - w[0] for w in worth.values())
    assert brute(worth, price, budget) - step <= total <= brute(worth, price, budget)


def test_ranks_by_sorted_scores_are_the_best_components_of_all_sites():
    """What EVA and AdaLoRA ask: the n highest scores, wherever they are."""
    g = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(6, generator=g).sort(descending=True).values for name in "abcd"}
    ranks = allocate({n: [0.0, *s.cumsum(0).tolist()] for n, s in scores.items()}, 9)
    floor = torch.cat(list(scores.values())).sort(descending=True).values[8]
    assert ranks == {n: int((s >= floor).sum()) for n, s in scores.items()}


def test_ties_go_to_the_first_site_and_worthless_options_to_nobody():
    assert allocate({"a": [0, 1], "b": [0, 1]}, 1) == {"a": 1, "b": 0}
    assert allocate({"a": [0, 0], "b": [2, 1]}, 5) == {"a": 0, "b": 0}


def test_prices_must_rise():
    with pytest.raises(ValueError, match="'a' needs one rising price"):
        allocate({"a": [0, 1]}, 5, {"a": [1, 1]})


tied = st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), max_size=5), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(tied, st.integers(0, 12))
def test_the_best_components_are_a_sort_by_score_then_site_then_index(found, budget):
    scores = {str(i): torch.tensor(s) for i, s in enumerate(found)}
    flat = [(-v, i, j) for i, s in enumerate(found) for j, v in enumerate(s)]
    want = {(str(i), j) for _, i, j in sorted(flat)[:budget]}
    masks = best_components(scores, budget)
    assert {(n, int(j)) for n, m in masks.items() for j in m.nonzero()[:, 0]} == want


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 64), max_size=5), min_size=1, max_size=4), st.integers(0, 12)
)
def test_the_best_components_are_worth_what_the_allocator_reaches(found, budget):
    """Positive scores of whole numbers, whose sums are exact: both are the same optimum."""
    scores = {str(i): torch.tensor(s, dtype=torch.float64) for i, s in enumerate(found)}
    worth = {n: concave(s.tolist()) for n, s in scores.items()}
    options = allocate(worth, budget)
    masks = best_components(scores, budget)
    taken = sum(float(scores[n][m].sum()) for n, m in masks.items())
    assert taken == sum(worth[n][i] for n, i in options.items())
    assert sum(int(m.sum()) for m in masks.values()) == sum(options.values())


def test_nothing_to_choose_from():
    assert best_components({}, 3) == {}
    masks = best_components({"a": torch.zeros(2), "b": torch.zeros(0)}, 9)
    assert masks["a"].all() and len(masks["b"]) == 0
