"""Expert Merging: coefficients with which the merge imitates each expert on that expert's inputs.

    min over a [k, sites] of  sum_i alpha_i [ T^2 CE(expert_i / T, merged / T)
                                              + w_h mean |h - h_i|^2 ]
                              + beta * k / (number of a) * sum |a - a_start|,    a = sigmoid(z)

Unlabelled inputs, five a task in the paper; the experts answer once. Expert Merging++ (`chunks`)
learns twice: the first round tells each site's importance

    I_l = mean_i |a_i^l| |dW_i^l|_F / sqrt(entries of W^l),  over the greatest
    K_l = round(chunks I_l)

and in the second the rows of dW^l are K_l pieces with a coefficient of their own. Nothing is merged
for that: a piece's coefficient scales its rows of B in the adapters' forward, and at the end too,
so that the result is exact, of the ranks' sum.
Paper: Zhang et al., 2025, arXiv 2509.25712. Departures: pieces are even blocks of rows (or columns)
of W [out, in], where the paper's of a flattened tensor depend on how it lies in memory and may end
within a row; the paper leaves the formula of I_l open, and this one is ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plait.adapter import adapters, low_rank_of
from plait.errors import PlaitError
from plait.merging.search.alignment import alignment
from plait.merging.search.coefficients import Form
from plait.merging.search.found import Found
from plait.merging.search.gradient import descend
from plait.merging.search.groups import Chunks, Grouping, layer_of
from plait.merging.search.method import Grouped, SearchMethod
from plait.merging.search.objectives import Objective
from plait.merging.search.problem import Problem
from plait.merging.search.trials import Log


@dataclass
class ExpertMerging(Grouped):
    grouping: Grouping = "site"
    """What shares a coefficient (paper: nothing, one for each site)."""
    chunks: int | Mapping[str, int] = 1
    """Most pieces of a site with coefficients of their own (++: above 1, in two rounds), or {site
    pattern: pieces} in one round; 0 pieces hold a site at the start."""
    hold: bool = False
    """++: sites whose pieces round to 0 are held at the start; else they keep one coefficient."""
    form: Form = "sigmoid"
    """"sigmoid" keeps coefficients in (0, 1) (paper); "free" does not."""
    start: float = 0.1
    """Coefficient at the start (paper: 0.1)."""
    temperature: float = 1.0
    """T (paper: 1)."""
    hidden: Sequence[str] | str = "middle"
    """Paths of modules whose outputs are to be alike too; "middle" is the middle block (paper)."""
    hidden_weight: float = 0.1
    """w_h (paper: 0.1)."""
    beta: float = 0.1
    """Weight of the coefficients' mean absolute move from the start (paper: 0.1)."""
    task_weights: Mapping[str, float] | None = None
    """alpha_i by expert; those that are not named have 1."""
    lr: float = 0.5
    """AdamW's learning rate, of the logits of a (paper's command line: 0.5)."""
    steps: int = 100
    """Gradient steps a round."""
    each: int | None = 1
    """Batches of each expert a step; None takes all."""
    clip: float | None = 1.0
    """Greatest norm of the gradient (paper: 1)."""

    wants = "experts"
    gradient = True

    def __post_init__(self) -> None:
        if isinstance(self.chunks, int) and self.chunks < 1:
            raise PlaitError(f"expert-merging: chunks is {self.chunks}; give at least 1.")

    @property
    def rounds(self) -> int:
        return 2 if isinstance(self.chunks, int) and self.chunks > 1 else 1

    def within(self, evaluations: int) -> ExpertMerging:
        if evaluations < 2 * self.rounds:
            raise PlaitError(f"expert-merging: a budget of {2 * self.rounds} evaluations at least.")
        return dataclasses.replace(self, steps=evaluations // self.rounds - 1)

    def find(self, problem: Problem) -> Found:
        objective = self._objective(problem)
        if not isinstance(self.chunks, int) or self.rounds == 1:
            return self._round(problem, objective, self.chunks, problem.log)
        first = self._round(problem, objective, 1, problem.log)
        sizes = importance(first)
        pieces = by_importance(sizes, self.chunks, 0 if self.hold else 1)
        found = self._round(problem, objective, pieces, problem.log.next())
        facts = {"importance": sizes, "chunks": pieces, "first": first}
        return dataclasses.replace(found, history=first.history + found.history, facts=facts)

    def _objective(self, problem: Problem) -> Objective:
        return alignment(
            problem.model,
            problem.of_experts(),
            problem.logits,
            temperature=self.temperature,
            hidden=self._hidden(problem),
            hidden_weight=self.hidden_weight,
            task_weights=self.task_weights,
            each=self.each,
            seed=problem.seed,
        )

    def _hidden(self, problem: Problem) -> list[str]:
        if self.hidden != "middle":
            return [self.hidden] if isinstance(self.hidden, str) else list(self.hidden)
        known, attached = dict(problem.model.named_modules()), adapters(problem.model)
        paths = {path for name in problem.names for path in attached[name].deltas}
        # A container of layers is no block: it never runs.
        run = [p for p, m in known.items() if type(m).forward is not nn.Module.forward]
        blocks = [p for p in run if p in set(map(layer_of, paths)) - paths]
        return blocks[len(blocks) // 2 :][:1]

    def _round(self, problem: Problem, objective: Objective, chunks: Chunks, log: Log) -> Found:
        space = self.space(problem, chunks=chunks, form=self.form, start=self.start)

        def penalty(c: Tensor) -> Tensor:
            return self.beta * len(c) * (c - self.start).abs().mean()

        return descend(
            space,
            objective,
            steps=self.steps,
            lr=self.lr,
            optimizer="adamw",
            clip=self.clip,
            penalty=penalty if self.beta else None,
            log=log,
        )


def importance(found: Found) -> dict[str, float]:
    """{site path: mean_i |a_i| |dW_i|_F / sqrt(entries of W)}, the greatest being 1."""
    sizes: dict[str, float] = {}
    with torch.no_grad():
        for adapter, weights in zip(found.space.adapters, found.weights(), strict=True):
            for path, delta in adapter.deltas.items():
                low = low_rank_of(delta, energy=1.0)[0]
                entries = delta.site.shape[-2] * delta.site.shape[-1]
                a = float(torch.as_tensor(weights[path]).abs().mean())
                size = a * float(low.norm()) / entries**0.5
                sizes[path] = sizes.get(path, 0.0) + size / len(found.space.adapters)
    most = max(sizes.values()) or 1.0
    return {path: size / most for path, size in sizes.items()}


def by_importance(sizes: Mapping[str, float], most: int, least: int = 1) -> dict[str, int]:
    """{site path: K}: round(most * importance), `least` at least."""
    return {path: max(least, min(most, round(most * size))) for path, size in sizes.items()}


METHOD = SearchMethod(
    name="expert-merging",
    title="Expert Merging: imitate each expert on its own unlabelled inputs",
    paper="Zhang et al., 2025, arXiv 2509.25712",
    search=ExpertMerging,
)
