"""LoraHub: weights of many adapters for a new task, from a handful of examples, without gradients.

    min over w in [-1.5, 1.5]^k of  loss(few examples; W0 + sum_i w_i dW_i) + 0.05 mean |w_i|

From w = 0 and in 40 evaluations, as in the paper. Departures: changes are added, where the paper
adds the As and the Bs apart (which mixes terms B_i A_j, needs equal ranks, and depends on how an
adapter's factors happen to be turned); Nelder-Mead or CMA-ES in place of nevergrad's NGOpt; or, as
the sum is differentiable, `optimizer="gradient"`.
Paper: Huang et al., 2023, arXiv 2307.13269.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from plait.errors import PlaitError
from plait.merging.search.coefficients import Coefficients
from plait.merging.search.derivative_free import minimise
from plait.merging.search.found import Found
from plait.merging.search.gradient import descend
from plait.merging.search.method import SearchMethod
from plait.merging.search.objectives import Batch, supervised
from plait.statistics.gradients import Loss


def lorahub(
    model: nn.Module,
    names: Sequence[str],
    examples: Sequence[Batch],
    loss: Loss | None = None,
    *,
    optimizer: Literal["nelder-mead", "cma", "random", "gradient"] = "cma",
    evaluations: int = 40,
    bound: float = 1.5,
    l1: float = 0.05,
    spread: float = 0.5,
    lr: float = 0.05,
    seed: int = 0,
    log: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Found:
    """One weight for each of these attached adapters; `examples` are labelled batches, all seen
    at every evaluation. `spread` is of the derivative-free searches, `lr` of the gradient's."""
    if evaluations < 2 or bound <= 0 or l1 < 0:
        raise PlaitError("lorahub: evaluations at least 2, bound above 0, l1 at least 0.")
    space = Coefficients(model, names, start=0.0, bounds=(-bound, bound))
    objective = supervised(examples, loss)

    def penalty(c: Tensor) -> Tensor:
        return l1 * c.abs().mean()

    common: dict[str, Any] = {"penalty": penalty, "log": log, "progress": progress}
    if optimizer == "gradient":
        return descend(space, objective, steps=evaluations - 1, lr=lr, keep="best", **common)
    return minimise(
        space,
        objective,
        evaluations=evaluations,
        optimizer=optimizer,
        spread=spread,
        seed=seed,
        **common,
    )


METHOD = SearchMethod(
    name="lorahub",
    title="LoraHub: adapters' weights for a new task from a few examples",
    paper="Huang et al., 2023, arXiv 2307.13269",
    run=lorahub,
)
