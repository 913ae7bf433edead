"""Learning coefficients by gradient descent through the adapted forward."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.merging.search.coefficients import Coefficients
from plait.merging.search.found import Found, Penalty
from plait.merging.search.objectives import Objective
from plait.merging.search.trials import Place, as_log

Keep = Literal["last", "best"]


def descend(
    space: Coefficients,
    objective: Objective,
    *,
    steps: int = 100,
    lr: float = 1e-2,
    optimizer: Literal["adam", "adamw"] = "adam",
    clip: float | None = None,
    penalty: Penalty | None = None,
    keep: Keep = "last",
    log: Place = None,
) -> Found:
    """Adam on the raw numbers of `space`; only they learn.

    Args:
        steps: gradient steps; the last point is evaluated too, so the history has steps + 1.
        clip: greatest norm of the gradient.
        penalty: of the coefficients, added to the objective.
        keep: the last coefficients, or those of the least value seen (for objectives that see the
            same data at every step).
        log: a file that the search goes on from when it was killed, or a `Log`.
    """
    if steps < 1 or lr <= 0:
        raise PlaitError(f"descend: steps ({steps}) and lr ({lr}) must be greater than 0.")
    raw = space.start.clone().requires_grad_()
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer]
    steady: Any = kind([raw], lr=lr)
    search = space.described() | {"search": "descend", "lr": lr, "optimizer": optimizer}
    best: tuple[float, Tensor] | None = None
    trace = as_log(log).open(search, steps + 1, "coefficients")
    with space.searching(), trace as trials:
        for step in range(steps + 1):
            at = raw.detach().clone()
            entry = trials(at, partial(_ask, space, objective, at, step, penalty))
            if best is None or keep == "last" or entry["value"] < best[0]:
                best = entry["value"], at
            if step == steps:
                break
            raw.grad = torch.tensor(entry["gradient"], dtype=raw.dtype)
            if clip is not None:
                torch.nn.utils.clip_grad_norm_([raw], clip)
            steady.step()
            with torch.no_grad():
                raw.copy_(space.project(raw))
    assert best is not None
    return Found(space, space.values(best[1]), best[0], trials.history)


def _ask(
    space: Coefficients, objective: Objective, raw: Tensor, step: int, penalty: Penalty | None
) -> dict[str, Any]:
    value, gradient = value_and_gradient(space, objective, raw, step, penalty)
    return {"value": value, "gradient": gradient.tolist()}


def value_and_gradient(
    space: Coefficients,
    objective: Objective,
    raw: Tensor,
    step: int = 0,
    penalty: Penalty | None = None,
) -> tuple[float, Tensor]:
    """The objective at raw z [k, g] and its gradient there; call it within `space.searching()`.

    With form "free" entry [i, j] is the sum over group j's sites of <dL/dW, dW_i>, for which no
    gradient of W is ever formed.
    """
    with torch.enable_grad():
        z = raw.detach().clone().requires_grad_()
        c = space.values(z)
        space.use(c)
        total = objective(space.model, step)
        if penalty is not None:
            total = total + penalty(c).to(total.device)
        if not bool(torch.isfinite(total)):
            raise PlaitError(
                f"the objective is {float(total.detach())} at step {step}; start elsewhere."
            )
        (gradient,) = torch.autograd.grad(total, z)
    return float(total.detach()), gradient
