"""Spending a budget over sites: which of its options each site gets (ranks, bit widths).

`allocate`: every option has a price and a worth. Greedy steps along each site's upper concave hull,
the best worth per price first: the optimum where steps cost alike and pay ever less (a spectrum's
energy, sorted scores of components), elsewhere less than one step's worth below it.

`best_components`: every component has a score and all cost alike, so that the optimum is the
highest scores, wherever they are. It spends the whole budget, on components that score 0 too.
"""

import heapq
from collections.abc import Mapping, Sequence
from itertools import pairwise, takewhile
from typing import NamedTuple

import torch
from torch import Tensor


def allocate(
    worth: Mapping[str, Sequence[float]],
    budget: float,
    price: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, int]:
    """{site: index of its option}, of great total worth at a total price of at most `budget`.

    Args:
        worth: of each site's options, cheapest first. For ranks 0 to k: sums of the leading scores.
        budget: what all options chosen may cost together.
        price: of the same options, strictly rising; None means that option i costs i.

    Equal claims go to the site that comes first. Raises ValueError for prices that do not rise, or
    a budget below that of everyone's cheapest option.
    """
    prices = {s: list((price or {}).get(s, range(len(w)))) for s, w in worth.items()}
    for site, p in prices.items():
        if len(p) != len(worth[site]) or not p or any(a >= b for a, b in pairwise(p)):
            raise ValueError(f"allocate: {site!r} needs one rising price for each of its options.")
    left = budget - sum(p[0] for p in prices.values())
    if left < 0:
        raise ValueError(f"allocate: a budget of {budget} is {-left} short of the least possible.")
    steps = {s: _hull_steps(prices[s], worth[s]) for s in worth}
    chosen = dict.fromkeys(worth, 0)
    queue = [
        (-moves[0].rate, order, s, 0) for order, (s, moves) in enumerate(steps.items()) if moves
    ]
    heapq.heapify(queue)
    while queue:
        _, order, site, at = heapq.heappop(queue)
        step = steps[site][at]
        if step.cost > left:
            continue  # a site that cannot pay takes no later step; cheaper sites still may
        chosen[site], left = step.option, left - step.cost
        if at + 1 < len(steps[site]):
            heapq.heappush(queue, (-steps[site][at + 1].rate, order, site, at + 1))
    return chosen


def best_components(scores: Mapping[str, Tensor], budget: int) -> dict[str, Tensor]:
    """{site: [components] of booleans, on the CPU}: the `budget` highest of all `scores`.

    Equal ones in the order given: by site, then by index. All of them where there are fewer.
    """
    if not scores:
        return {}
    order = torch.cat(list(scores.values())).argsort(descending=True, stable=True).cpu()
    best = torch.zeros(len(order), dtype=torch.bool)
    best[order[: max(budget, 0)]] = True
    return dict(zip(scores, best.split([len(s) for s in scores.values()]), strict=True))


class _Step(NamedTuple):
    rate: float
    cost: float
    option: int


def _hull_steps(price: Sequence[float], worth: Sequence[float]) -> list[_Step]:
    """Steps along the upper concave hull of (price, worth), as far as worth grows."""

    def rate(i: int, j: int) -> float:
        return (worth[j] - worth[i]) / (price[j] - price[i])

    hull = [0]
    for j in range(1, len(price)):
        while len(hull) > 1 and rate(hull[-2], hull[-1]) < rate(hull[-1], j):
            hull.pop()
        hull.append(j)
    steps = [_Step(rate(i, j), price[j] - price[i], j) for i, j in pairwise(hull)]
    return list(takewhile(lambda step: step.rate > 0, steps))
