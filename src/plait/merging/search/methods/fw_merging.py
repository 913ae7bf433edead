"""FW-Merging: Frank-Wolfe over the convex hull of a pool of adapters, some of them irrelevant.

    theta_{t+1} = (1 - gamma) theta_t + gamma v,   v = argmin over the hull's vertices of <g, v>
    g = gradient of the tasks' mean loss at theta_t, gamma = step_size * 2 / (t + 2)

theta is held as coefficients: <g, dW_s> is the gradient of coefficient s, so one backward through
the active adapters answers for the whole pool and no gradient of W is formed. Irrelevant adapters
are not picked.
Paper: Chen et al., 2025, arXiv 2503.12649 (its hard variant). Departures: inner products are of
changes, where the released code takes cosines of whole checkpoints, base included.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import nn

from plait.merging.search.coefficients import Coefficients, Grouping
from plait.merging.search.found import Found
from plait.merging.search.frank_wolfe import Oracle, frank_wolfe
from plait.merging.search.method import SearchMethod
from plait.merging.search.objectives import Objective


def fw_merging(
    model: nn.Module,
    names: Sequence[str],
    objective: Objective,
    *,
    steps: int = 10,
    step_size: float = 1.0,
    scale: float = 1.0,
    oracle: Oracle = "whole",
    grouping: Grouping = "adapter",
    start: float = 0.0,
    base: bool = True,
    log: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Found:
    """Coefficients in the hull of these attached adapters, times `scale`.

    Args:
        objective: `supervised(batches)` with labels, `entropy(tasks)` without, or any other.
        step_size: the paper's 1 for language models, 0.1 for vision.
        oracle: "whole": one adapter a step; "group": one for each group, with grouping "layer" or
            "site".
        start: coefficient of every adapter at the start; 0 is the base, 1 / k the mean.
        base: whether the base itself is in the pool.
    """
    space = Coefficients(model, names, grouping=grouping, start=start)
    return frank_wolfe(
        space,
        objective,
        steps=steps,
        step_size=step_size,
        scale=scale,
        oracle=oracle,
        base=base,
        log=log,
        progress=progress,
    )


METHOD = SearchMethod(
    name="fw-merging",
    title="FW-Merging: Frank-Wolfe over a pool of adapters",
    paper="Chen et al., 2025, arXiv 2503.12649",
    run=fw_merging,
)
