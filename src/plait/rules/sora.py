"""SoRA: LoRA behind a gate that a proximal step closes exactly, component by component.

    dW = scaling * B diag(g) A        g <- T_tau(g after the optimiser),  tau = lambda * step size
    T_tau(u) = sign(u) max(|u| - tau, 0)

A [r, in] starts as LoRA's, B [out, r] at 0, g [r] from N(0, 1). A closed gate goes on training, and
opens again where a step carries it beyond tau. When the run ends, components behind closed gates
are removed with their optimiser state, which changes nothing. Several `lambdas` are the paper's
sparsifying schedule: from one trained model on to ever sparser ones, with a record of the ranks at
the end of each stage (`history`).
Departures: `scale="adam"` steps in Adam's own metric, where lambda is the weight of sum |g| in the
loss for every gate alike; lambda rises over `warmup`, since gates could close before B has left 0.
Paper: Ding et al., 2023, arXiv 2311.11696. Parameters: r (in + out + 1) a site at the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from plait.adapter import Method, Rule, Run, per_site
from plait.adapter.choices import check_choices
from plait.adapter.rule import split_group
from plait.errors import PlaitError
from plait.linalg import best_components
from plait.rules._sparse_gate import (
    SparseGateDelta,
    SparseGateOptions,
    find_gates,
    shrunk,
    sparse_gate_count,
)
from plait.rules._steps import step_sizes


@dataclass
class Sora(Rule):
    lambdas: Sequence[float] = (0.4,)
    """Strengths, each for an equal share of the run (the code: 1e-4 to 1e-3 with scale="none")."""
    scale: Literal["rate", "adam", "none"] = "rate"
    """What lambda is multiplied by: the learning rate (the paper), Adam's step for a gradient of 1
    entry by entry, or nothing (the authors' code)."""
    threshold: Literal["soft", "legacy"] = "soft"
    """The proximal step, or the authors' masks, which close every gate below 2 tau."""
    l1: float = 0.0
    """Weight of mean |g| over all gates in the loss (the authors' code: 10)."""
    warmup: float = 0.1
    """Steps over which lambda rises from 0; a share of the run below 1."""
    target_rank: float | None = None
    """Average rank that the end may leave: beyond it the components of least norm go as well."""

    claims = frozenset({"ranks"})

    def __post_init__(self) -> None:
        check_choices(self, "sora")
        if not self.lambdas or min(self.lambdas) < 0 or self.l1 < 0:
            raise PlaitError("sora: lambdas are one or more numbers of at least 0, and so is l1.")
        if self.target_rank is not None and self.target_rank <= 0:
            raise PlaitError(f"sora: target_rank must be above 0, not {self.target_rank}.")

    def check(self, run: Run) -> None:
        super().check(run)
        find_gates(run)
        run.steps(self.warmup)  # raises where it is a share of an unknown length
        if len(self.lambdas) > 1 and (run.total_steps or 0) < len(self.lambdas):
            raise PlaitError(f"sora: {len(self.lambdas)} lambdas need as many total_steps.")

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._deltas = find_gates(run)
        self.history: list[dict[str, Any]] = []

    def strength(self, step: int) -> float:
        """lambda after optimiser step `step`, counted from 1."""
        warm = self.run.steps(self.warmup)
        return float(self.lambdas[self._stage(step)]) * min(1.0, step / warm if warm else 1.0)

    def _stage(self, step: int) -> int:
        count, total = len(self.lambdas), self.run.total_steps
        return 0 if count == 1 or not total else min(count - 1, (step - 1) * count // total)

    def ranks(self) -> dict[str, int]:
        """{"adapter/site path": open gates}."""
        return {name: int(delta.g.count_nonzero()) for name, delta in self._deltas.items()}

    def parameter_groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        gates = {id(delta.g) for delta in self._deltas.values()}
        made = []
        for group in groups:
            own, rest = split_group(group, lambda _, p: id(p) in gates)
            made += [rest, {**own, "weight_decay": 0.0}]
        return made

    def extra_loss(self) -> Tensor | None:
        if not self.l1:
            return None
        found = [d.g.abs().sum() for d in self._deltas.values()]
        return self.l1 * torch.stack(found).sum() / sum(len(d.g) for d in self._deltas.values())

    @torch.no_grad()
    def after_step(self) -> None:
        step = self.run.step
        strength = self.strength(step)
        gates: list[Any] = [delta.g for delta in self._deltas.values()]
        for g, size in zip(gates, self._sizes(gates), strict=True):
            g.copy_(shrunk(g, size * strength, self.threshold == "legacy"))
        if step == self.run.total_steps or self._stage(step) < self._stage(step + 1):
            last = float(self.lambdas[self._stage(step)])
            self.history.append({"step": step, "lambda": last, "ranks": self.ranks()})

    def _sizes(self, gates: list[Any]) -> list[Any]:
        if self.scale == "none":
            return [1.0] * len(gates)
        return step_sizes(self.run.optimizer, gates, adaptive=self.scale == "adam")

    def finish(self) -> None:
        stays = {name: (d.g != 0).cpu() for name, d in self._deltas.items()}
        if self.target_rank is not None:
            sizes = {n: d.component_norms().detach().float().cpu() for n, d in self._deltas.items()}
            best = best_components(sizes, round(self.target_rank * len(sizes)))
            stays = {name: open_ & best[name] for name, open_ in stays.items()}
        for name, mask in stays.items():
            if not mask.all():
                self._deltas[name].keep(mask.nonzero()[:, 0], self.run.optimizer)
        for adapter in self.run.adapters:
            adapter.info["sora"] = self.history

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = list(state["history"])


METHOD = Method(
    name="sora",
    title="SoRA: rank that a proximal step switches off exactly",
    paper="Ding et al., 2023, arXiv 2311.11696",
    axis="parameterisation",
    options=SparseGateOptions,
    delta=SparseGateDelta,
    rule=Sora,
    count=per_site(sparse_gate_count),
)
