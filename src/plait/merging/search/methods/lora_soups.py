"""LoRA Soups (CAT): one learned weight for each adapter at each layer, for a skill of two skills.

    y = W0 x + sum_i a_i^l s_i B_i A_i x,   a^l = softmax of k logits (or free), start 1 / k

Only the weights learn, from a little labelled data that needs the skills together. The result is
the adapters' concatenation, of rank sum r_i.
Paper: Prabhakar et al., 2024, arXiv 2410.13025 (AdamW at 1e-4, one pass over 10k samples).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from plait.merging.search.found import Found
from plait.merging.search.gradient import descend
from plait.merging.search.groups import Grouping
from plait.merging.search.method import Grouped, SearchMethod
from plait.merging.search.problem import Problem


@dataclass
class LoraSoups(Grouped):
    form: Literal["softmax", "free"] = "softmax"
    """"softmax" (the released code's: weights add up to 1) or "free" (the paper's text)."""
    grouping: Grouping = "layer"
    """What shares a weight: "adapter", "layer" (the paper's) or "site"."""
    lr: float = 1e-4
    """AdamW's learning rate (paper: 1e-4)."""
    steps: int | None = None
    """Gradient steps of one batch each, shuffled; None is one pass over the data (the paper's)."""

    gradient = True

    def find(self, problem: Problem) -> Found:
        space = self.space(problem, form=self.form)
        count = sum(map(len, problem.tasks.values())) if self.steps is None else self.steps
        return descend(
            space,
            problem.lowered(each=1),
            steps=count,
            lr=self.lr,
            optimizer="adamw",
            log=problem.log,
        )


METHOD = SearchMethod(
    name="lora-soups",
    title="LoRA Soups: learned concatenation of skills, a weight a layer",
    paper="Prabhakar et al., 2024, arXiv 2410.13025",
    search=LoraSoups,
)
