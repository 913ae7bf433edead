"""MAP: the Pareto front of several tasks over the adapters' scalings, from few evaluations.

    1. evaluate metrics y_t(c), t = 1..T, at S points c in a box       S = (k + 1)(k + 2) by default
    2. fit each as link(c^T A_t c + b_t^T c + e_t)                     (k + 1)(k + 2) / 2 unknowns
    3. non-dominated points of the surrogates: no further evaluation

The model is only asked S times. Fits are linear least squares after the link's inverse (the paper:
non-linear from one start), the front stays within the sampled box (the released code leaves it, and
extrapolates), and the evolution is a small one of our own in place of NSGA-III.
Paper: Li et al., 2024, arXiv 2406.07529.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plait.errors import PlaitError
from plait.merging.search.coefficients import Coefficients, Grouping
from plait.merging.search.found import Found
from plait.merging.search.method import SearchMethod
from plait.merging.search.pareto import Link, Quadratic, fit_quadratic, front, terms
from plait.merging.search.trials import open_trials

Metrics = Callable[[nn.Module], Sequence[float]]
"""Of the model with coefficients in use: one number for each task, the greater the better."""


@dataclass(frozen=True)
class Front:
    """Pareto-optimal coefficients by the surrogates, and what they promise."""

    space: Coefficients
    points: Tensor
    """[p, k, g]."""
    metrics: Tensor
    """[p, T], by the surrogates."""
    surrogates: list[Quadratic]
    history: list[dict[str, Any]]

    def choose(self, preference: Sequence[float]) -> Found:
        """The point of greatest weighted sum of metrics, each scaled to [0, 1] over the front."""
        w = torch.tensor(list(preference), dtype=torch.float64)
        if len(w) != self.metrics.shape[1] or bool((w < 0).any()):
            raise PlaitError(f"choose: give {self.metrics.shape[1]} weights of at least 0.")
        low, high = self.metrics.amin(0), self.metrics.amax(0)
        best = int(((self.metrics - low) / (high - low).clamp_min(1e-12) @ w).argmax())
        value = float(self.metrics[best] @ w)
        facts = {"metrics": self.metrics[best].tolist()}
        return Found(self.space, self.points[best], value, self.history, facts)


def map_merging(
    model: nn.Module,
    names: Sequence[str],
    metrics: Metrics,
    *,
    evaluations: int | None = None,
    box: tuple[float, float] = (0.0, 1.0),
    link: Link = "identity",
    grouping: Grouping = "adapter",
    size: int = 100,
    seed: int = 0,
    log: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Front:
    """The front over scalings of these attached adapters.

    Args:
        metrics: `metrics(model)` -> one number a task; called `evaluations` times.
        evaluations: S; None is (n + 1)(n + 2) for n coefficients. At least half of that.
        box: least and greatest coefficient, of what is sampled and of the front.
        link: "sigmoid" for accuracies, "softplus" for numbers above 0.
        size: the most points that the front has.
    """
    space = Coefficients(model, names, grouping=grouping, start=box[0], bounds=box)
    n = space.shape[0] * space.shape[1]
    count = 2 * terms(n) if evaluations is None else evaluations
    if count < terms(n):
        raise PlaitError(
            f"map: {n} coefficients need at least {terms(n)} evaluations, not {count}."
        )
    points = _sampled(n, count, box, seed)
    search = space.described() | {"search": "map", "seed": seed, "evaluations": count}
    with space.searching(), torch.no_grad(), open_trials(log, search, count, "map", progress) as t:
        rows = []
        for point in points:
            c = point.reshape(space.shape)

            def ask(c: Tensor = c) -> dict[str, Any]:
                space.use(c)
                return {"metrics": [float(value) for value in metrics(model)]}

            rows.append(t(c, ask)["metrics"])
    values = torch.tensor(rows, dtype=torch.float64)
    surrogates = [fit_quadratic(points, column, link) for column in values.T]
    edges = torch.full((n,), box[0]).double(), torch.full((n,), box[1]).double()
    found = front(surrogates, edges, size=size, seed=seed)
    promised = torch.stack([surrogate(found) for surrogate in surrogates], 1)
    return Front(space, found.reshape(-1, *space.shape), promised, surrogates, t.history)


def _sampled(n: int, count: int, box: tuple[float, float], seed: int) -> Tensor:
    """The box's origin, each adapter alone, then a low-discrepancy sequence: [count, n]."""
    alone = torch.cat([torch.zeros(1, n), torch.eye(n)]).double()
    rest = torch.quasirandom.SobolEngine(n, scramble=True, seed=seed).draw(count).double()
    return box[0] + (box[1] - box[0]) * torch.cat([alone, rest])[:count]


METHOD = SearchMethod(
    name="map",
    title="MAP: Pareto fronts of several tasks from a few evaluations",
    paper="Li et al., 2024, arXiv 2406.07529",
    run=map_merging,
)
