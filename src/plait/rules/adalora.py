"""AdaLoRA: start with more rank than wanted and drop the triplets that matter least, model-wide.

    dW = scaling * P diag(e) Q     budget(t) = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_f - t_i))^3

A is Q [r, in], B is P [out, r]. At every step each entry w of P, e and Q is scored by |w dL/dw|,
smoothed, times its smoothed deviation; a triplet by its e plus the means of its row and column.
From step t_i on, e is set to 0 in all triplets but the budget's best, over all sites together. One
that was set to 0 keeps training and may come back until step T - t_f; then the pattern is final,
and the triplets outside it are really removed, with their optimiser state (`shrink`: at once, at
each pruning, which is cheaper but lets none come back; or only when the run ends, which is the
paper's masking and the form that several processes can train). The loss gets `orthogonal` times the
mean of ||Q Q^T - I|| and ||P^T P - I||.
Departures: the scaling stays what it was at the start; scores are taken before the optimiser moves,
with the weights that the gradient belongs to (the paper's algorithm; PEFT takes them after).
Paper: Zhang et al., 2023, arXiv 2303.10512. Parameters: r (in + out + 1) a site at the start.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from plait.adapter import Method, Rule, Run, per_site
from plait.adapter.choices import check_choices
from plait.rules._adalora_peft import CODEC
from plait.rules._base_weights import refuse_several_processes
from plait.rules._budget import BudgetPlan, plan_budget
from plait.rules._orthogonal import orthogonality
from plait.rules._pruning import Chosen, Triplets, find_triplets
from plait.rules._sensitivity import EntryScores
from plait.rules._triplets import TripletDelta, TripletOptions, triplet_count


@dataclass
class Adalora(Rule):
    target_rank: float | None = None
    """Average rank over sites at the end; None is two thirds of the start's (paper: 12 to 8)."""
    warmup: float = 0.1
    """t_i, steps before pruning; a share of the run below 1 (the paper: 5 to 10 %)."""
    final: float = 0.3
    """t_f, steps with the final pattern; a share of the run below 1 (the paper: 20 to 60 %)."""
    interval: int = 1
    """Steps between prunings (the paper: 1 to 10, 100 in long runs)."""
    beta1: float = 0.85
    """Smoothing of the scores."""
    beta2: float = 0.85
    """Smoothing of their deviation."""
    orthogonal: float = 0.1
    """Weight of the regulariser (the paper: 0.1 to 0.5; PEFT: 0.5)."""
    shrink: Literal["final", "always", "end"] = "final"
    """When dropped triplets leave memory: at T - t_f, at each pruning, or after the run."""

    claims = frozenset({"ranks"})

    def __post_init__(self) -> None:
        check_choices(self, "adalora")

    def check(self, run: Run) -> None:
        super().check(run)
        plan_budget(run, find_triplets(run), self)
        if self.shrink != "end":
            refuse_several_processes("Adalora", "changes the shapes of parameters (shrink='end')")

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._triplets = Triplets(run, EntryScores(self.beta1, self.beta2))
        self._plan = plan_budget(run, self._triplets.deltas, self)
        self._pattern: Chosen | None = None  # the final one, while it is only a mask

    @property
    def budget(self) -> int:
        """Triplets over all sites that the last step may leave."""
        return self._plan.at(self.run.step)

    def before_step(self) -> None:
        if self.run.step < self._plan.last:
            self._triplets.observe()

    def after_step(self) -> None:
        step, plan = self.run.step, self._plan
        if step == plan.last:
            self._end(drop=self.shrink != "end")
        elif self._pattern is not None:
            self._triplets.mask(self._pattern)
        elif plan.first < step < plan.last and step % self.interval == 0:
            chosen = self._triplets.choose(self.budget)
            self._triplets.mask(chosen)
            if self.shrink == "always":
                self._triplets.drop(chosen, self.run.optimizer)

    def _end(self, drop: bool) -> None:
        chosen = self._pattern or self._triplets.choose(self.budget)
        self._triplets.mask(chosen)
        self._pattern = None if drop else chosen
        if drop:
            self._triplets.drop(chosen, self.run.optimizer)
        self._triplets.scores.forget()

    def finish(self) -> None:
        # A run that was cut short keeps the budget of its last step.
        if self.run.step < self._plan.last or self._pattern is not None:
            self._end(drop=True)

    def extra_loss(self) -> Tensor | None:
        if not self.orthogonal:
            return None
        deltas = [d for d in self._triplets.deltas.values() if d.rank]
        grams = [gram for d in deltas for gram in (d.A, d.B.mT)]
        return self.orthogonal * orthogonality(grams) / len(grams)

    def state_dict(self) -> dict[str, Any]:
        scores, plan = self._triplets.scores.state_dict(), list(dataclasses.astuple(self._plan))
        return {"scores": scores, "plan": plan, "pattern": self._pattern}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._triplets.scores.load_state_dict(state["scores"])
        # The plan was made from the ranks at the start, which a resumed adapter no longer has.
        self._plan, self._pattern = BudgetPlan(*state["plan"]), state["pattern"]


METHOD = Method(
    name="adalora",
    title="AdaLoRA: rank dropped where it matters least during training",
    paper="Zhang et al., 2023, arXiv 2303.10512",
    axis="parameterisation",
    options=TripletOptions,
    delta=TripletDelta,
    rule=Adalora,
    count=per_site(triplet_count),
    peft=CODEC,
)
