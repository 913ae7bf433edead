"""LISA: full-rank training of a few randomly drawn blocks at a time.

    step      0 ........ K ........ 2K .......        embeddings, final norm and head always train;
    blocks    {3, 17}    {0, 9}     {3, 22}           `blocks` others do, drawn anew every K steps

No adapter: the base weights themselves train (`method: none`). Under LoRA the norm of the weight
change is large in the embedding and the head and small between them; sampling imitates that skew.
State of a block that freezes is dropped: kept (as in the paper's code), it would grow to full
training's memory once every block has had its turn.
Paper: Pan et al., 2024, arXiv 2403.17919.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plait.adapter import Method, Rule, Run, block_index, find_blocks, make_group
from plait.adapter.choices import check_choices
from plait.adapter.seeds import generator
from plait.errors import PlaitError
from plait.rules._base_weights import base_group, refuse_several_processes, train_base


@dataclass
class Lisa(Rule):
    blocks: int = 2
    """Blocks that train at a time (the paper's gamma: 1 or 2, 4 for 70B)."""
    interval: int = 20
    """Steps between draws (the paper's K: 3 to 50)."""
    weights: list[float] | None = None
    """Relative frequency of every block; None draws them all alike. With weights, block l trains
    with probability blocks * w_l / sum(w), which must not exceed 1."""
    drop_states: bool = True
    """Drop the optimiser's state of blocks that freeze."""
    over: Literal["base", "adapters"] = "base"
    """Sample blocks of base weights, or (with an adapter attached) of the adapters' deltas."""

    needs_adapter = False

    def __post_init__(self) -> None:
        check_choices(self, "lisa")
        self.claims = frozenset({"base"} if self.over == "base" else ())

    def check(self, run: Run) -> None:
        if self.over == "base" and run.adapters:
            raise PlaitError(
                f"rule Lisa trains base weights, which adapter {run.adapters[0].name!r} relies "
                "on; use `method: none`, or over='adapters'."
            )
        if self.over == "adapters" and not run.adapters:
            raise PlaitError("rule Lisa with over='adapters' needs an adapter that trains.")
        count = len(self._find(run))
        if not 1 <= self.blocks <= count:
            raise PlaitError(f"lisa: blocks is {self.blocks}, but the model has {count} of them.")
        if self.interval < 1:
            raise PlaitError(f"lisa: interval must be at least 1, not {self.interval}.")
        self._check_weights(count)
        refuse_several_processes("Lisa", "freezes and unfreezes blocks")

    def _check_weights(self, count: int) -> None:
        if self.weights is None:
            return
        if len(self.weights) != count or min(self.weights) < 0 or sum(self.weights) <= 0:
            raise PlaitError(f"lisa: weights must be {count} numbers of at least 0, one a block.")
        if max(self.weights) * self.blocks > sum(self.weights) * (1 + 1e-9):
            raise PlaitError(
                f"lisa: a block of weight {max(self.weights)} would train with probability above "
                "1; lower it or `blocks`."
            )

    def _find(self, run: Run) -> list[list[nn.Parameter]]:
        if self.over == "base":
            return [list(block.parameters()) for _, block in find_blocks(run.model)]
        found: dict[int, list[nn.Parameter]] = {}
        for path, delta in ((p, d) for a in run.adapters for p, d in a.deltas.items()):
            if (index := block_index(path)) is not None:
                found.setdefault(index, []).extend(delta.parameters())
        return [found[i] for i in sorted(found)]

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._sets = self._find(run)
        self._generator = generator(run.seed, "lisa")
        if self.over == "base":
            train_base(run.model)
        self._train_only(self._draw())

    def parameter_groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.over == "base":
            return [*groups, base_group(self.run)]
        # The default group lists what requires a gradient now; later draws need the others.
        sampled = {id(p) for block in self._sets for p in block}
        named = [(f"{a.name}/{n}", p) for a in self.run.adapters for n, p in a.named_parameters()]
        trains = [(n, p) for n, p in named if p.requires_grad or id(p) in sampled]
        return [make_group(trains, self.run.lr, self.run.weight_decay)]

    def _draw(self) -> list[int]:
        """Indices of the next blocks: exactly `blocks` of them, none twice."""
        order = torch.randperm(len(self._sets), generator=self._generator)
        if self.weights is None:
            return sorted(order[: self.blocks].tolist())
        # Systematic sampling: equidistant marks on the cumulative weights, in random order, hit
        # block l with probability exactly proportional to its weight.
        weight = torch.tensor(self.weights, dtype=torch.float64)[order]
        edges = (weight / weight.sum() * self.blocks).cumsum(0)
        start = torch.rand((), dtype=torch.float64, generator=self._generator)
        marks = start + torch.arange(self.blocks, dtype=torch.float64)
        hits = torch.searchsorted(edges, marks, right=True).clamp_max(len(order) - 1)
        return sorted(order[hits].tolist())

    def _train_only(self, blocks: list[int]) -> None:
        self.active = blocks  # indices of those that train now
        kept = {id(p) for index in blocks for p in self._sets[index]}
        for parameter in (p for block in self._sets for p in block):
            on = id(parameter) in kept
            if parameter.is_floating_point():
                parameter.requires_grad_(on)
            if on:
                continue
            parameter.grad = None
            if self.drop_states and self.run.optimizer is not None:
                optimizer = getattr(self.run.optimizer, "optimizer", self.run.optimizer)
                optimizer.state.pop(parameter, None)

    def after_step(self) -> None:
        if self.run.step % self.interval == 0:
            self._train_only(self._draw())

    def state_dict(self) -> dict[str, Any]:
        return {"active": list(self.active), "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        drawn: Tensor = state["generator"]
        self._generator.set_state(drawn.cpu())
        self._train_only([int(i) for i in state["active"]])


METHOD = Method(
    name="lisa",
    title="LISA: full-rank training of randomly sampled blocks",
    paper="Pan et al., 2024, arXiv 2403.17919",
    axis="rule",
    rule=Lisa,
    rule_example={"blocks": 1, "interval": 2},
)
