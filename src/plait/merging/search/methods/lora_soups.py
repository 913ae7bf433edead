"""LoRA Soups (CAT): one learned weight for each adapter at each layer, for a skill of two skills.

    y = W0 x + sum_i a_i^l s_i B_i A_i x,   a^l = softmax of k logits (or free), start 1 / k

Only the weights learn, from a little labelled data that needs the skills together. The result is
the adapters' concatenation, of rank sum r_i.
Paper: Prabhakar et al., 2024, arXiv 2410.13025 (AdamW at 1e-4, one pass over 10k samples).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

from torch import nn

from plait.merging.search.coefficients import Coefficients, Grouping
from plait.merging.search.found import Found
from plait.merging.search.gradient import descend
from plait.merging.search.method import SearchMethod
from plait.merging.search.objectives import Batch, supervised
from plait.statistics.gradients import Loss


def lora_soups(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    loss: Loss | None = None,
    *,
    form: Literal["softmax", "free"] = "softmax",
    grouping: Grouping = "layer",
    lr: float = 1e-4,
    steps: int | None = None,
    seed: int = 0,
    log: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Found:
    """Weights of these attached adapters; `batches` are labelled, one a step, shuffled.

    Args:
        form: "softmax" (the released code's: weights add up to 1) or "free" (the paper's text).
        steps: None is one pass over the batches.
    """
    space = Coefficients(model, names, grouping=grouping, form=form)
    objective = supervised(batches, loss, each=1, seed=seed)
    count = len(batches) if steps is None else steps
    return descend(
        space, objective, steps=count, lr=lr, optimizer="adamw", log=log, progress=progress
    )


METHOD = SearchMethod(
    name="lora-soups",
    title="LoRA Soups: learned concatenation of skills, a weight a layer",
    paper="Prabhakar et al., 2024, arXiv 2410.13025",
    run=lora_soups,
)
