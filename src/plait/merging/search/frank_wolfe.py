"""Frank-Wolfe: each step goes a little towards the one adapter that the gradient points to.

    g = dL/dc                     g[s, j] = <dL/dW, dW_s> over the sites of group j
    s* = argmin_s scale * g[s]    the vertex of the hull that is lowest along g (0 is the base)
    c <- (1 - gamma) c + gamma * scale * e_s*,     gamma = step_size * 2 / (t + 2)

c stays in the convex hull of the adapters (times `scale`); those that do not help are never picked.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.merging.search.coefficients import Coefficients
from plait.merging.search.found import Found
from plait.merging.search.gradient import value_and_gradient
from plait.merging.search.objectives import Objective
from plait.merging.search.trials import Place, as_log

Oracle = Literal["whole", "group"]


def frank_wolfe(
    space: Coefficients,
    objective: Objective,
    *,
    steps: int = 10,
    step_size: float = 1.0,
    scale: float = 1.0,
    oracle: Oracle = "whole",
    base: bool = True,
    log: Place = None,
) -> Found:
    """`steps` steps over the hull; `space` must be of form "free", and starts at its start.

    Args:
        oracle: one vertex for the whole model, or one for each group of sites.
        base: whether the model without adapters is a vertex too.

    Each entry of the history has the step's "gap" <g, c - v>, at least 0 inside the hull, an upper
    bound of how far a convex objective is from its least value there; and "picked", the adapter
    (or one for each group; None is the base).
    """
    if space.form != "free" or space.bounds is not None:
        raise PlaitError("frank_wolfe keeps to the hull by itself; give form 'free', no bounds.")
    if not 0 < step_size <= 1 or scale <= 0 or oracle not in ("whole", "group"):
        raise PlaitError("frank_wolfe: step_size in (0, 1], scale > 0, oracle 'whole' or 'group'.")
    c = space.start.clone()
    search = space.described() | {"search": "frank-wolfe", "step_size": step_size, "scale": scale}
    search |= {"oracle": oracle, "base": base}
    trace = as_log(log).open(search, steps + 1, "frank-wolfe")
    with space.searching(), trace as trials:
        for step in range(steps + 1):
            at = c.clone()
            entry = trials(at, partial(_ask, space, objective, at, step))
            gradient = torch.tensor(entry["gradient"], dtype=c.dtype)
            vertex, picked = lowest(gradient, scale, oracle, base)
            entry["gap"] = float((gradient * (at - vertex)).sum())
            entry["picked"] = [None if i < 0 else space.names[i] for i in picked]
            if step < steps:
                gamma = step_size * 2 / (step + 2)
                c = (1 - gamma) * at + gamma * vertex
    return Found(space, c, entry["value"], trials.history)


def _ask(space: Coefficients, objective: Objective, at: Tensor, step: int) -> dict[str, Any]:
    value, gradient = value_and_gradient(space, objective, at, step)
    return {"value": value, "gradient": gradient.tolist()}


def lowest(gradient: Tensor, scale: float, oracle: Oracle, base: bool) -> tuple[Tensor, list[int]]:
    """The vertex [k, g] of least inner product with the gradient, and whose it is (-1: base).

    Of equals the first is taken.
    """
    slopes = gradient.sum(1, keepdim=True) if oracle == "whole" else gradient
    least, where = slopes.min(0)
    taken = (least < 0) | (not base)
    picked = torch.where(taken, where, -1)
    wide = picked.expand(gradient.shape[1])
    vertex = scale * (torch.arange(len(gradient))[:, None] == wide).to(gradient.dtype)
    return vertex, picked.tolist()
