"""Flexora: which blocks an adapter is worth having in, learned on held-out data.

    y = W x + a_l dW x      a = N softmax(alpha), one alpha for each of N blocks, from 0 (a = 1)

    search   a step trains the adapter on training data, with a as it stands; then alpha takes a
             step of Adam on the validation loss, which the adapter itself never sees
    select   S = {l: alpha_l > 0}, or the `keep` greatest
    train    S only, from the start again, with a = 1; the other blocks are frozen

`hypergrad` says how far alpha's gradient follows training: "direct" (the released code) not at all,
"unroll1" and "unrollK" through one or `unroll` steps of gradient descent on the last batches.
Softmax makes alpha relative: about half the blocks pass. Sites outside all blocks have no gate and
stay. Blocks that leave go back to where the run began, and the adapter loses its sites there when
it ends; a run cut short in the search keeps the S of its last step, as trained. The held-out
batches are `eval_data`'s or `validation`. Departure: a multiplies dW once (released: a^3).
Paper: Wei et al., 2024, arXiv 2408.10774. Trains |S| / N of the adapter after the search.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from plait.adapter import Method, Rule, Run
from plait.adapter.choices import check_choices
from plait.errors import PlaitError
from plait.rules._base_weights import refuse_several_processes
from plait.rules._block_choice import BlockChoice, best_blocks, check_choice
from plait.rules._block_gates import BlockGates
from plait.rules._hypergradient import ESTIMATORS, Bilevel
from plait.rules._recent_batches import RecentBatches, batches_from


@dataclass
class Flexora(Rule):
    search: float = 0.5
    """Steps of the search; a share of the run below 1."""
    keep: int | None = None
    """How many blocks to keep; None keeps those of positive alpha (the paper)."""
    hypergrad: Literal["direct", "unroll1", "unrollK"] = "direct"
    """The gradient of alpha: without training's answer, through one step, through `unroll`."""
    unroll: int = 2
    """Steps of "unrollK", each of which keeps a training graph in memory."""
    alpha_lr: float = 0.01
    """Adam's rate for alpha."""
    batches: int = 8
    """Held-out batches for a step of alpha, in turn."""
    interval: int = 1
    """Training steps between steps of alpha."""
    inner_lr: float | None = None
    """Rate of unrolled steps; None is the optimiser's at the time."""
    restart: bool = True
    """Train S from the start again, moments and all (the paper), not from the search's end."""

    claims = frozenset({"gates", "ranks"})

    def __post_init__(self) -> None:
        check_choices(self, "flexora")
        for name in ("unroll", "batches", "interval", "keep"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise PlaitError(f"flexora: {name} must be at least 1, not {value}.")

    def check(self, run: Run) -> None:
        super().check(run)
        check_choice(run, "flexora")
        if run.total_steps is not None and run.steps(self.search) >= run.total_steps:
            raise PlaitError("flexora: the search must end before the run; lower `search`.")
        refuse_several_processes("Flexora", "freezes blocks and drops them")

    def setup(self, run: Run) -> None:
        super().setup(run)
        if not run.validation:
            raise PlaitError("flexora learns on held-out data; give eval_data= or validation=.")
        self._end, self._gates = run.steps(self.search), BlockGates(run)
        self._choice = BlockChoice(run, self._gates)
        self.alpha = self._choice.alpha
        self._adam = torch.optim.Adam([self.alpha], lr=self.alpha_lr)
        count = {"direct": 0, "unroll1": 1, "unrollK": self.unroll}[self.hypergrad]
        self._recent = RecentBatches(run.model, count)

    def gates(self) -> Tensor:
        """a [N], which sums to N."""
        return len(self.alpha) * self.alpha.softmax(0)

    def selected(self) -> list[int]:
        """Indices of the chosen blocks; during the search, of those that it would choose now."""
        if self._choice.chosen is not None:
            return self._choice.chosen
        return best_blocks(self._gates.blocks, self.alpha, self.keep)

    def extra_loss(self) -> None:
        self._recent.note()

    def after_step(self) -> None:
        if self._choice.chosen is not None:
            return
        if self.run.step % self.interval == 0:
            self.alpha.grad = self.hypergradient()
            self._adam.step()
            self._gates.set(self.gates().unbind())
        self._recent.advance()
        if self.run.step >= self._end:
            self._end_search(self.restart)

    def hypergradient(self) -> Tensor:
        """d L_val / d alpha [N] at the present factors; no other gradient is touched."""
        a = self.gates().requires_grad_()
        self._gates.set(a.unbind())
        first = self.run.step // self.interval * self.batches
        held_out = batches_from(self.run.validation, first, self.batches)
        rate, steps = self._choice.rate(self.inner_lr), self._recent.steps()
        problem = Bilevel(self.run.model, self._choice.parameters, a, held_out, steps, rate)
        g = ESTIMATORS[self.hypergrad if steps else "direct"](problem)
        self._gates.set(a.detach().unbind())
        return a.detach() * (g - (self.alpha.softmax(0) * g).sum())  # through the softmax

    def _end_search(self, restart: bool) -> None:
        self._choice.choose(self.selected(), restart)
        self._recent.close()

    def finish(self) -> None:
        if self._choice.chosen is None:
            self._end_search(restart=False)
        self._choice.drop()

    def state_dict(self) -> dict[str, Any]:
        state = {"alpha": self.alpha.clone(), "adam": self._adam.state_dict()}
        return state | self._choice.state_dict() | self._recent.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.alpha.copy_(state["alpha"])
        self._adam.load_state_dict(state["adam"])
        self._recent.load_state_dict(state)
        self._gates.set(self.gates().unbind())
        self._choice.load_state_dict(state)
        if self._choice.chosen is not None:
            self._recent.close()


METHOD = Method(
    name="flexora",
    title="Flexora: blocks worth an adapter, found on held-out data",
    paper="Wei et al., 2024, arXiv 2408.10774",
    axis="rule",
    rule=Flexora,
    rule_example={"search": 3, "batches": 2},
)
