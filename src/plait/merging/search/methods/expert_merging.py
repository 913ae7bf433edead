"""Expert Merging: coefficients with which the merge imitates each expert on that expert's inputs.

    min over a [k, sites] of  sum_i alpha_i [ T^2 CE(expert_i / T, merged / T)
                                              + w_h mean |h - h_i|^2 ]
                              + beta * k / (number of a) * sum |a - a_start|,    a = sigmoid(z)

Unlabelled inputs, five a task in the paper; the experts answer once. For Expert Merging++ a second
round takes `grouping=by_importance(importance(first))`: sites that matter get coefficients of their
own, others share their layer's.
Paper: Zhang et al., 2025, arXiv 2509.25712. Departures: importance decides how finely coefficients
are shared, not into how many chunks one weight's entries are cut (chunks of a flattened tensor
depend on its memory layout); and its formula is ours, see `importance`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from plait.adapter import low_rank_of
from plait.errors import PlaitError
from plait.merging.search.alignment import alignment
from plait.merging.search.coefficients import Coefficients, Form, Grouping, layer_of
from plait.merging.search.found import Found
from plait.merging.search.gradient import descend
from plait.merging.search.method import SearchMethod
from plait.merging.search.objectives import Batch, Logits


def expert_merging(
    model: nn.Module,
    data: Mapping[str, Sequence[Batch]],
    logits: Logits | None = None,
    *,
    grouping: Grouping | Callable[[str], str] = "site",
    form: Form = "sigmoid",
    start: float = 0.1,
    temperature: float = 1.0,
    hidden: Sequence[str] = (),
    hidden_weight: float = 0.1,
    beta: float = 0.1,
    task_weights: Mapping[str, float] | None = None,
    lr: float = 0.5,
    steps: int = 100,
    each: int | None = 1,
    clip: float | None = 1.0,
    seed: int = 0,
    log: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Found:
    """Coefficients of the attached adapters named in `data`, {name: its unlabelled batches}.

    Args:
        hidden: paths of modules (a middle layer in the paper) whose outputs count with
            `hidden_weight`.
        form: "sigmoid" keeps coefficients in (0, 1); "free" does not.
        beta: weight of the mean absolute move from the start, added up over experts.
        each: batches of each expert a step; None takes all.
        lr, start, clip: the released command line's (0.5 moves sigmoid's logits).
    """
    space = Coefficients(model, list(data), grouping=grouping, form=form, start=start)
    objective = alignment(
        model,
        data,
        logits,
        temperature=temperature,
        hidden=hidden,
        hidden_weight=hidden_weight,
        task_weights=task_weights,
        each=each,
        seed=seed,
    )

    def penalty(c: Tensor) -> Tensor:
        return beta * len(c) * (c - start).abs().mean()

    return descend(
        space,
        objective,
        steps=steps,
        lr=lr,
        optimizer="adamw",
        clip=clip,
        penalty=penalty if beta else None,
        log=log,
        progress=progress,
    )


def importance(found: Found) -> dict[str, float]:
    """{site path: mean_i |a_i| |dW_i|_F / sqrt(entries of W)}, the greatest being 1."""
    sizes: dict[str, float] = {}
    with torch.no_grad():
        for adapter, weights in zip(found.space.adapters, found.weights(), strict=True):
            for path, delta in adapter.deltas.items():
                low = low_rank_of(delta, energy=1.0)[0]
                entries = delta.site.shape[-2] * delta.site.shape[-1]
                size = abs(weights[path]) * float(low.norm()) / entries**0.5
                sizes[path] = sizes.get(path, 0.0) + size / len(found.space.adapters)
    most = max(sizes.values()) or 1.0
    return {path: size / most for path, size in sizes.items()}


def by_importance(sizes: Mapping[str, float], own: float = 0.5) -> Callable[[str], str]:
    """A grouping for a second round: sites of importance `own` and above by themselves, others by
    layer."""
    if not 0 <= own <= 1:
        raise PlaitError(f"by_importance: own is a share in [0, 1], not {own}.")
    return lambda path: path if sizes.get(path, 0.0) >= own else f"{layer_of(path)} (rest)"


METHOD = SearchMethod(
    name="expert-merging",
    title="Expert Merging: imitate each expert on its own unlabelled inputs",
    paper="Zhang et al., 2025, arXiv 2509.25712",
    run=expert_merging,
)
