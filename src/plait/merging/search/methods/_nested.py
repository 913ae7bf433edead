"""Nested MAP: tasks are merged two by two, and the results two by two, on fronts of two numbers.

    round 1   (a, b) ──► c = s e_a + t e_b      (c, d) ──► ...      closest metrics first
    round 2   (ab, cd) ──► c = s c_ab + t c_cd                      log2 k rounds, k - 1 fronts

A pair is only measured at its own tasks. On each front the preference chooses one point; the last
front is the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.merging.search.coefficients import Coefficients
from plait.merging.search.found import Found
from plait.merging.search.front import Front, checked, favourite
from plait.merging.search.pareto import terms
from plait.merging.search.problem import Metric, Problem
from plait.merging.search.sampling import cover
from plait.merging.search.trials import Trials

if TYPE_CHECKING:
    from plait.merging.search.methods.map import Map


@dataclass(frozen=True)
class Node:
    """Adapters that are one by now: their coefficients, tasks and the tasks' weighted mean."""

    c: Tensor
    tasks: tuple[str, ...]
    value: float


@dataclass
class _Nesting:
    way: Map
    space: Coefficients
    metrics: dict[str, Metric]
    weights: dict[str, float]
    trials: Trials
    each: int
    seed: int

    def measured(self, c: Tensor, *groups: Sequence[str]) -> list[float]:
        """Each group's weighted mean of metrics at coefficients c."""
        tasks = [task for group in groups for task in group]

        def ask() -> dict[str, Any]:
            self.space.use(c)
            found = {task: float(self.metrics[task](self.space.model)) for task in tasks}
            return {"metrics": found}

        found = self.trials(c, ask)["metrics"]
        return [
            sum(self.weights[t] * found[t] for t in group) / sum(self.weights[t] for t in group)
            for group in groups
        ]

    def merged(self, a: Node, b: Node) -> tuple[Node, Front, dict[str, Any]]:
        shares = cover(2, self.each, self.way.box, self.seed)
        points = torch.einsum("ps,skg->pkg", shares, torch.stack([a.c, b.c]))
        values = torch.tensor([self.measured(c, a.tasks, b.tasks) for c in points])
        values = values.double()
        surrogates = self.way.fit(shares, values)
        found = self.way.front(surrogates, 2, self.seed)
        promised = torch.stack([surrogate(found) for surrogate in surrogates], 1)
        wa, wb = (sum(self.weights[t] for t in node.tasks) for node in (a, b))
        w = checked([wa, wb], 2)
        best = favourite(promised, w)
        front = Front(
            self.space,
            ["+".join(a.tasks), "+".join(b.tasks)],
            torch.einsum("ps,skg->pkg", found, torch.stack([a.c, b.c])),
            promised,
            surrogates,
            values,
            self.trials.history,
        )
        fact = {
            "pair": front.objectives,
            "shares": found[best].tolist(),
            "metrics": promised[best].tolist(),
            "r2": [s.r2 for s in surrogates],
        }
        node = Node(front.points[best], a.tasks + b.tasks, float(promised[best] @ w))
        return node, front, fact


def nested(way: Map, space: Coefficients, problem: Problem) -> Found:
    """The last front's preferred point; `facts["pairs"]` tells how it came about."""
    metrics = _by_adapter(problem)
    k = len(metrics)
    if k < 2:
        raise PlaitError("map: nested merges two adapters at least.")
    each = 2 * terms(2) if way.evaluations is None else (way.evaluations - k) // (k - 1)
    if each < terms(2):
        raise PlaitError(f"map: nested needs {k + terms(2) * (k - 1)} evaluations at least.")
    given = checked(way.preference, k).clamp_min(1e-9).tolist()
    weights = dict(zip(problem.measured(), given, strict=True))
    search = way.described(space, problem) | {"evaluations": each, "link": way.link}
    search |= {"edge": way.edge, "preference": given, "size": way.size, "solver": way.solver}
    trace = problem.log.open(search, k + each * (k - 1), "map")
    pairs: list[dict[str, Any]] = []
    with space.searching(), torch.no_grad(), trace as trials:
        nest = _Nesting(way, space, metrics, weights, trials, each, problem.seed)
        nodes = []
        for i, task in enumerate(metrics):
            c = space.alone(i)
            nodes.append(Node(c, (task,), nest.measured(c, [task])[0]))
        while len(nodes) > 1:
            couples, rest = closest(nodes)
            nodes = rest
            for a, b in couples:
                node, front, fact = nest.merged(a, b)
                nodes.append(node)
                pairs.append(fact)
    (last,) = nodes
    made = {"pairs": pairs, "metrics": front.metrics[_row(front, last.c)].tolist()}
    return Found(space, last.c, last.value, trials.history, made, front)


def closest(nodes: Sequence[Node]) -> tuple[list[tuple[Node, Node]], list[Node]]:
    """Pairs, the one of nearest values first; and whoever is left over."""
    left, pairs = list(nodes), []
    while len(left) > 1:
        a, b = min(
            ((a, b) for i, a in enumerate(left) for b in left[i + 1 :]),
            key=lambda pair: abs(pair[0].value - pair[1].value),
        )
        pairs.append((a, b))
        left = [node for node in left if node is not a and node is not b]
    return pairs, left


def _by_adapter(problem: Problem) -> dict[str, Metric]:
    """Metrics in the adapters' order: by name where tasks are named so, else as they stand."""
    metrics = problem.measured()
    if len(metrics) != len(problem.names):
        raise PlaitError(
            f"map: nested wants a task for each adapter; there are {len(metrics)} tasks and "
            f"{len(problem.names)} adapters."
        )
    if set(metrics) == set(problem.names):
        return {name: metrics[name] for name in problem.names}
    return dict(metrics)


def _row(front: Front, c: Tensor) -> int:
    return int((front.points - c).flatten(1).abs().amax(1).argmin())
