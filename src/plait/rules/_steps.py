"""How far an optimiser moves an entry for a gradient of 1: the metric of proximal steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def step_sizes(
    optimizer: Any, parameters: list[nn.Parameter], adaptive: bool = True
) -> list[Tensor | float]:
    """For each parameter lr, or lr / (sqrt(v) + eps) entry by entry where the optimiser is an Adam.

    Adam divides gradients by sqrt(v); a penalty applied outside it must be divided alike, or its
    weight would mean another one for every entry. `adaptive=False` asks for lr alone. 0 for what
    the optimiser does not hold.
    """
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    state = optimizer.state if adaptive else {}
    return [_step(state.get(p, {}), group_of.get(id(p))) for p in parameters]


def _step(state: dict[str, Any], group: dict[str, Any] | None) -> Tensor | float:
    if group is None:
        return 0.0
    second, lr = state.get("exp_avg_sq"), float(group["lr"])
    if second is None or "betas" not in group:
        return lr
    corrected = second / (1 - group["betas"][1] ** int(state.get("step", 1)))
    return lr / (corrected.sqrt() + group["eps"])
