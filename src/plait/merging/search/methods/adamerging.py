"""AdaMerging: coefficients that make the merged model sure of its answers, without labels.

    min over c of  sum over tasks of  H(p(y | x; W0 + sum_i c_i^l dW_i^l))      H: entropy
    c [k] (task-wise) or [k, layers]; start 0.3, Adam

Unlabelled inputs of all tasks; one batch of each a step. Entropy has trivial minima (one class for
everything): few steps, and a look at the classes predicted. AdaMerging++ is this on trimmed
adapters (`plait.merge([a], "ties", density=0.2)` of each alone, first).
Paper: Yang et al., 2023, arXiv 2310.02575. Adapters stay in eval mode, without dropout.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import nn

from plait.merging.search.coefficients import Coefficients, Grouping
from plait.merging.search.found import Found
from plait.merging.search.gradient import descend
from plait.merging.search.method import SearchMethod
from plait.merging.search.objectives import Batch, Logits, entropy


def adamerging(
    model: nn.Module,
    names: Sequence[str],
    tasks: Sequence[Sequence[Batch]],
    logits: Logits | None = None,
    *,
    grouping: Grouping = "layer",
    start: float = 0.3,
    clamp: bool = False,
    lr: float = 1e-3,
    steps: int = 500,
    seed: int = 0,
    log: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Found:
    """Coefficients of these attached adapters; `tasks` are lists of unlabelled batches.

    Args:
        logits: `logits(model, batch, task)`, for models with a head for each task.
        grouping: "adapter" (the paper's task-wise), "layer" (its layer-wise) or "site".
        clamp: keep coefficients in [0, 1].
        start, lr, steps: the paper's 0.3, 1e-3 and 500.
    """
    bounds = (0.0, 1.0) if clamp else None
    space = Coefficients(model, names, grouping=grouping, start=start, bounds=bounds)
    objective = entropy(tasks, logits, seed=seed)
    return descend(space, objective, steps=steps, lr=lr, log=log, progress=progress)


METHOD = SearchMethod(
    name="adamerging",
    title="AdaMerging: coefficients of least entropy on unlabelled data",
    paper="Yang et al., 2023, arXiv 2310.02575",
    run=adamerging,
)
