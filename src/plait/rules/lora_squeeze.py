"""LoRA-Squeeze: train at a generous rank, and cut it step by step to the rank that is wanted.

    r_src > .. > r_tgt    s B A = U S V^T    B' = U_k (S_k / s)^(1/2)    A' = (S_k / s)^(1/2) V_k^T

At equal intervals each pair gives way to the best approximation of its dW at a lower rank, found in
the factors alone: QR of both, then the SVD of an r x r core. The scaling stays, a held-back start
is not touched, and later steps mend by what the loss has jumped. `choose` deals a stage's ranks to
the sites: to all alike, where singular values are largest ("pooled", at the same total), or as few
as hold `energy` of a site's squares. `state` says whether Adam's moments go on, projected, or begin
anew; `rewarm` then eases the rate in.
Works with methods that train a plain (A, B) pair. The same cut after training is
`adapter.to_lora(rank=k)`.
Paper: Vulić et al., 2026, arXiv 2602.10993. Parameters: r_src (in + out) a site, r_tgt (in + out)
in the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from plait.adapter import Method, PairDelta, Rule, Run
from plait.adapter.choices import check_choices
from plait.errors import PlaitError
from plait.kernels._gate import exact_dtypes
from plait.rules._annealing import by_energy, plan_annealing, pooled, spectrum
from plait.rules._base_weights import refuse_several_processes
from plait.rules._squeeze import squeeze


@dataclass
class LoraSqueeze(Rule):
    target_rank: int = 4
    """Rank at the end, reached by halving (paper: 1 to 16, from 2 to 8 times as much)."""
    ranks: Sequence[int] | None = None
    """The falling ranks themselves, instead of halving; the mean over sites, if not uniform."""
    at: Sequence[float] | None = None
    """The steps of the cuts to `ranks`, shares of the run below 1; None is equal intervals."""
    choose: Literal["uniform", "pooled", "energy"] = "uniform"
    """How a stage's rank is dealt to the sites."""
    energy: float = 0.95
    """Share of a site's squared singular values that choose="energy" keeps."""
    state: Literal["project", "reset"] = "project"
    """The optimiser's moments at a cut: carried over, or begun anew (the paper)."""
    rewarm: int = 0
    """Steps after each cut over which the learning rate climbs back from 0."""

    claims = frozenset({"ranks"})

    def __post_init__(self) -> None:
        check_choices(self, "lora-squeeze")
        if not 0 < self.energy <= 1 or self.rewarm < 0:
            raise PlaitError("lora-squeeze: energy lies in (0, 1], and rewarm is at least 0.")

    def check(self, run: Run) -> None:
        super().check(run)
        plan_annealing(run, _most(_pairs(run)), self)
        refuse_several_processes("LoraSqueeze", "changes the shapes of parameters")

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._deltas = _pairs(run)
        self._plan = plan_annealing(run, _most(self._deltas), self)
        self._rates: list[tuple[dict[str, Any], float]] = []
        self.history: list[dict[str, Any]] = []

    def ranks_now(self) -> dict[str, int]:
        """{"adapter/site path": rank}."""
        return {name: delta.rank for name, delta in self._deltas.items()}

    def before_step(self) -> None:
        done, groups = self.run.step, self.run.optimizer.param_groups  # type: ignore[union-attr]
        since = min((done - step for step, _ in self._plan if step <= done), default=self.rewarm)
        if since < self.rewarm:
            # Put back after the step: the scheduler goes on from its own rates.
            self._rates = [(group, group["lr"]) for group in groups]
            for group, rate in self._rates:
                group["lr"] = rate * (since + 1) / (self.rewarm + 1)

    def after_step(self) -> None:
        for group, rate in self._rates:
            group["lr"] = rate
        self._rates = []
        for step, rank in self._plan:
            if step == self.run.step:
                with exact_dtypes(next(iter(self._deltas.values())).A.device.type):
                    self._cut(rank)

    def _cut(self, rank: int) -> None:
        dropped = {}
        for name, k in self._chosen(rank).items():
            delta = self._deltas[name]
            if k < delta.rank:
                project = self.state == "project"
                dropped[name] = squeeze(delta, k, self.run.optimizer, project)
        found = {"step": self.run.step, "ranks": self.ranks_now(), "dropped_energy": dropped}
        self.history.append(found)

    def _chosen(self, rank: int) -> dict[str, int]:
        if self.choose == "uniform":
            return dict.fromkeys(self._deltas, rank)
        spectra = {name: spectrum(delta) for name, delta in self._deltas.items()}
        if self.choose == "pooled":
            return pooled(spectra, rank)
        return by_energy(spectra, rank, self.energy)

    def finish(self) -> None:
        for adapter in self.run.adapters:
            adapter.info["lora-squeeze"] = self.history

    def state_dict(self) -> dict[str, Any]:
        return {"plan": self._plan, "history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # The plan was made from the rank at the start, which a resumed adapter no longer has.
        self._plan, self.history = state["plan"], list(state["history"])


def _most(found: dict[str, PairDelta]) -> int:
    return max(delta.rank for delta in found.values())


def _pairs(run: Run) -> dict[str, PairDelta]:
    """{"adapter/site path": delta} of the run's plain pairs; PlaitError for any other kind."""
    found = run.deltas(PairDelta)
    for name, delta in found.items():
        plain = delta.pairs() and set(delta.rank_axes()) == {"A", "B"} and delta.scaling > 0
        if not plain:
            raise PlaitError(
                f"rule LoraSqueeze cuts pairs with dW = scaling * B A, and {name!r} has none; use "
                "a method such as lora."
            )
    if not found:
        raise PlaitError("rule LoraSqueeze needs an adapter with (A, B) pairs; attach lora.")
    return found


METHOD = Method(
    name="lora-squeeze",
    title="LoRA-Squeeze: ranks annealed during training by truncated SVD",
    paper="Vulić et al., 2026, arXiv 2602.10993",
    axis="rule",
    rule=LoraSqueeze,
    rule_example={"target_rank": 1},
)
