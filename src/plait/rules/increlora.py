"""IncreLoRA: start at rank 1 and add rank where it matters.

    dW = scaling * B diag(e, g .. g) A        e: gates of the active components, trained from 0
                                              g: 1e-5 for the reserve, fixed ("advance learning")

Every site starts with `rank` active components and a reserve whose A and B already train behind a
tiny gate. At intervals the sites of highest score turn their reserve active and get a new one,
until the average rank is `target_rank`. The score of a site at one step is sum |dW * dL/d(dW)| /
sqrt(out in), smoothed, times its smoothed deviation. dW and its gradient are formed on score steps
only, by hooks on the site; training itself rides the factors.
Departures: the scaling stays alpha / (initial rank) when a site grows (`rescale` gives the paper's
alpha / (current rank), which moves the whole dW at each growth); the regulariser makes all of a
site's components mutually orthogonal, where the paper's code treats each part by itself; the B of a
reserve starts at 0, not N(0, std), so that neither the start nor a new reserve moves dW at all.
Paper: Zhang et al., 2023, arXiv 2308.12043. Parameters: (rank + reserve)(in + out) + rank a site.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from plait.adapter import Method, Rule, Run, per_site
from plait.errors import PlaitError
from plait.rules._base_weights import refuse_several_processes
from plait.rules._gated import GatedDelta, GatedOptions, gated_count
from plait.rules._growth import GrowthPlan, dealt, plan_growth
from plait.rules._importance import Importance
from plait.rules._orthogonal import orthogonality


@dataclass
class Increlora(Rule):
    target_rank: float = 8.0
    """Average active rank over sites at the end (the paper: 2 to 8)."""
    top_h: int | None = None
    """Sites that grow at a time; None is the paper's 5, or more where growth would end too late."""
    warmup: float = 0.1
    """Steps before the first growth; a share of the run below 1 (the paper: 100 to 1000 steps)."""
    interval: int | None = None
    """Steps between growths (the paper: 20 to 100); None spreads them until `finish_by`."""
    finish_by: float = 0.7
    """When growth should have ended; a share of the run below 1."""
    score_every: int = 1
    """Score on every n-th step while growing: each costs dW and its gradient at every site."""
    beta1: float = 0.85
    """Smoothing of the score."""
    beta2: float = 0.85
    """Smoothing of its deviation."""
    orthogonal: float = 0.1
    """Weight of the mean over sites of ||A A^T - I|| + ||B^T B - I||; the paper has 0.1 to 0.5."""

    claims = frozenset({"ranks"})

    def check(self, run: Run) -> None:
        super().check(run)
        plan_growth(run, _gated(run), self)
        refuse_several_processes("Increlora", "changes the shapes of parameters")

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._deltas = _gated(run)
        self._plan = plan_growth(run, self._deltas, self)
        self._importance = Importance(self._deltas, self.beta1, self.beta2)
        self._done = False
        self._watch()

    def _watch(self) -> None:
        due = (self.run.step + 1) % self.score_every == 0
        self._importance.watch(due and not self._done)

    def scores(self) -> dict[str, float]:
        """Smoothed importance times smoothed deviation, by "adapter/site path"."""
        return self._importance.scores()

    def before_step(self) -> None:
        self._importance.update()

    def after_step(self) -> None:
        if not self._done and self._plan.due(self.run.step):
            self._grow()
        self._watch()

    def _grow(self) -> None:
        missing = self._plan.target - sum(d.rank for d in self._deltas.values())
        reserves = {name: delta.reserve for name, delta in self._deltas.items()}
        for name, extra in dealt(self.scores(), reserves, self._plan.sites, missing).items():
            self._deltas[name].grow(extra, self.run.optimizer)
            missing -= extra
        if missing <= 0:
            self._end()

    def _end(self) -> None:
        self._done = True
        for delta in self._deltas.values():
            if delta.reserve:
                delta.drop_reserve(self.run.optimizer)

    def finish(self) -> None:
        self._end()
        self._watch()

    def extra_loss(self) -> Tensor | None:
        if not self.orthogonal:
            return None
        grams = [gram for d in self._deltas.values() for gram in (d.A, d.B.mT)]
        return self.orthogonal * orthogonality(grams) / len(self._deltas)

    def state_dict(self) -> dict[str, Any]:
        plan = list(dataclasses.astuple(self._plan))
        return {**self._importance.state_dict(), "done": self._done, "plan": plan}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._importance.load_state_dict(state)
        self._done = bool(state["done"])
        # The plan was made from the ranks at the start, which a resumed adapter no longer has.
        self._plan = GrowthPlan(*state["plan"])
        self._watch()


def _gated(run: Run) -> dict[str, GatedDelta]:
    """{"adapter/site path": delta}; PlaitError where there are none."""
    found = run.deltas(GatedDelta)
    if not found:
        raise PlaitError("rule Increlora grows the gated deltas of method increlora; attach that.")
    return found


METHOD = Method(
    name="increlora",
    title="IncreLoRA: rank added where it matters during training",
    paper="Zhang et al., 2023, arXiv 2308.12043",
    axis="parameterisation",
    options=GatedOptions,
    delta=GatedDelta,
    rule=Increlora,
    rule_example={"target_rank": 2, "warmup": 2, "interval": 1, "top_h": 20},
    count=per_site(gated_count),
)
