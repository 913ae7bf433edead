"""How much of every group stays separate when the merged network may cost so much.

    max  sum_g worth_g r_g     over 0 <= r_g <= 1
    with sum_W |W| ((1 + r_a)(1 + r_b) - 2 r_a r_b) <= budget * sum_W |W|

|W| counts a weight's entries, a and b are the groups of its outputs and inputs (ratio 0 where there
is none), and 2 r_a r_b are its empty blocks. The bound is not convex, so SLSQP starts from several
points and the best end counts; ratios are then rounded down to whole units, which only makes the
network cheaper. Nasery et al., 2024, arXiv 2407.02447.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from plait.errors import PlaitError
from plait.merging.permutations.groups import Group, owners, tensors_of
from plait.merging.permutations.matching import Matching

Term = tuple[int, str | None, str | None]
"""Entries of a weight, and the groups on its axes."""


def cost_terms(model: nn.Module, groups: Sequence[Group]) -> list[Term]:
    """Every weight of two axes or more; what has one costs next to nothing."""
    owned, found = owners(groups), []
    for name, tensor in tensors_of(model).items():
        if tensor.dim() > 1 and tensor.is_floating_point():
            names = [group.name for group, _ in owned.get(name, {}).values()]
            first, second = (*names, None, None)[:2]
            found.append((tensor.numel(), first, second))
    return found


def cost(terms: Sequence[Term], ratios: Mapping[str, float]) -> float:
    """Of the merged network, as a multiple of one network's."""
    total = sum(size for size, _, _ in terms)
    spent = 0.0
    for size, a, b in terms:
        x, y = (0.0 if g is None else ratios.get(g, 0.0) for g in (a, b))
        spent += size * (1 + x + y - x * y)
    return spent / total


def budget_ratios(
    model: nn.Module,
    groups: Sequence[Group],
    budget: float,
    matching: Matching | None = None,
    *,
    worth: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """{group: ratio}, whole numbers of units, for a network that costs at most `budget` times one.

    Args:
        budget: 1 (every unit merged) to 2 (or what all units kept separate cost, if that is less).
        worth: of keeping a group's units apart; None takes 1 minus the mean cosine of its matched
            pairs, or 1 each without a matching.
    """
    if budget < 1:
        raise PlaitError(f"budget is at least 1, what one network costs, not {budget}.")
    free = [g for g in groups if g.widens]
    value = {g.name: _worth(g, matching) for g in free} | dict(worth or {})
    terms = cost_terms(model, groups)
    found = dict.fromkeys((g.name for g in free), 1.0)
    if free and cost(terms, found) > budget:
        found = _solve(terms, [g.name for g in free], value, budget)
    return {g.name: int(found[g.name] * g.size + 1e-6) / g.size for g in free}


def _worth(group: Group, matching: Matching | None) -> float:
    if matching is None:
        return 1.0
    return float((1 - matching.cosine[group.name]).mean().clamp_min(1e-3))


def _solve(
    terms: Sequence[Term], names: Sequence[str], value: Mapping[str, float], budget: float
) -> dict[str, float]:
    try:
        from scipy.optimize import minimize
    except ImportError as error:
        raise PlaitError("ratios from a budget need scipy: pip install scipy.") from error

    def ratios(x: Sequence[float]) -> dict[str, float]:
        return dict(zip(names, (float(v) for v in x), strict=True))

    def gain(x: Sequence[float]) -> float:
        return sum(value[n] * r for n, r in ratios(x).items())

    room = {"type": "ineq", "fun": lambda x: budget - cost(terms, ratios(x))}
    starts = [torch.full((len(names),), 0.5).tolist(), _greedy(terms, names, value, budget)]
    starts += [[float(n == m) for m in names] for n in names][:16]
    best = _greedy(terms, names, value, budget)
    for start in starts:
        ended = minimize(
            lambda x: -gain(x),
            start,
            method="SLSQP",
            bounds=[(0, 1)] * len(names),
            constraints=[room],
        ).x
        at = _within(terms, names, [min(1.0, max(0.0, float(v))) for v in ended], budget)
        best = max(best, at, key=gain)
    return ratios(best)


def _within(
    terms: Sequence[Term], names: Sequence[str], x: Sequence[float], budget: float
) -> list[float]:
    """The point on the way from 0 to x that the budget allows: costs rise along it."""
    low, high = 0.0, 1.0
    if cost(terms, dict(zip(names, x, strict=True))) <= budget:
        return list(x)
    for _ in range(50):
        middle = (low + high) / 2
        at = {n: middle * v for n, v in zip(names, x, strict=True)}
        low, high = (middle, high) if cost(terms, at) <= budget else (low, middle)
    return [low * v for v in x]


def _greedy(
    terms: Sequence[Term], names: Sequence[str], value: Mapping[str, float], budget: float
) -> list[float]:
    """Groups filled one after the other, the most worth for its price first."""
    alone = {n: cost(terms, {n: 1.0}) - 1 for n in names}
    order = sorted(names, key=lambda n: -value[n] / max(alone[n], 1e-12))
    found = dict.fromkeys(names, 0.0)
    for name in order:
        low, high = 0.0, 1.0
        if cost(terms, found | {name: 1.0}) <= budget:
            low = 1.0
        else:
            for _ in range(50):
                middle = (low + high) / 2
                fits = cost(terms, found | {name: middle}) <= budget
                low, high = (middle, high) if fits else (low, middle)
        found[name] = low
    return [found[n] for n in names]
