"""Training only some transformer blocks' share of the adapters, and dropping the others' for good.

narrow    parameters outside go back to where the run began and are frozen; their gate is 0
drop      pairs outside lose their rank (a held-back start with it), so that dW = 0
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plait.adapter import Run, block_index
from plait.errors import PlaitError
from plait.rules._block_gates import BlockGates, check_gates
from plait.rules._removal import remove_sites, shares_tensors


class BlockChoice:
    """What it takes to leave blocks out: the run's start, kept until the choice is made."""

    def __init__(self, run: Run, gates: BlockGates) -> None:
        self.run, self.gates = run, gates
        named = [(f"{a.name}/{n}", p) for a in run.adapters for n, p in a.named_parameters()]
        self.parameters = [p for _, p in named if p.requires_grad]
        self._named = {n: p for n, p in named if p.requires_grad}
        like = self.parameters[0]
        wide = torch.promote_types(like.dtype, torch.float32)
        self.alpha = torch.zeros(len(gates.blocks), dtype=wide, device=like.device)
        """A logit for each block's gate."""
        self.start: dict[str, Tensor] = {n: p.detach().clone() for n, p in self._named.items()}
        self.chosen: list[int] | None = None

    def choose(self, blocks: Sequence[int], restart: bool) -> None:
        """Train `blocks` only; with `restart` from the start again, moments and all."""
        outside = {id(p) for p in self._outside(blocks)}
        with torch.no_grad():
            for name, parameter in self._named.items():
                if restart or id(parameter) in outside:
                    parameter.copy_(self.start[name])
                    _forget(self.run.optimizer, parameter)
        self.narrow(blocks)

    def narrow(self, blocks: Sequence[int]) -> None:
        """Freeze what lies outside `blocks`, and take it out of the forward pass."""
        self.chosen, self.start = list(blocks), {}
        for parameter in self._outside(blocks):
            parameter.requires_grad_(False)
            parameter.grad = None
        self.gates.set([float(index in blocks) for index in self.gates.blocks])

    def drop(self) -> None:
        """Take the gates off, and out of the adapters what was left out."""
        assert self.chosen is not None
        trained = {id(p) for p in self.parameters}
        for parameter in self._outside(self.chosen):
            parameter.requires_grad_(id(parameter) in trained)
        self.gates.clear()
        for adapter in self.run.adapters:
            if not shares_tensors(adapter):
                out = {p for p in adapter.deltas if block_index(p) not in (None, *self.chosen)}
                remove_sites(adapter, out)

    def rate(self, given: float | None) -> float:
        """`given`, or else the optimiser's learning rate now."""
        if given is not None:
            return given
        assert self.run.optimizer is not None
        return float(self.run.optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        return {"chosen": self.chosen, "start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = {n: t.to(self._named[n].device) for n, t in state["start"].items()}
        if state["chosen"] is not None:
            self.narrow(state["chosen"])

    def _outside(self, blocks: Collection[int]) -> list[nn.Parameter]:
        found = (d for i, ds in self.gates.deltas.items() if i not in blocks for d in ds)
        return [p for delta in found for p in delta.parameters()]


def best_blocks(blocks: Sequence[int], scores: Tensor, keep: int | None) -> list[int]:
    """The `keep` blocks of highest score, or those of a positive one (the best one if none is)."""
    order = scores.argsort(descending=True, stable=True).tolist()
    count = max(1, int((scores > 0).sum())) if keep is None else keep
    return sorted(blocks[i] for i in order[:count])


def check_choice(run: Run, rule: str) -> None:
    """PlaitError unless `run`'s adapters can be left out of some of several blocks."""
    check_gates(run, rule)
    for adapter in run.adapters:
        zero = all(d.traits.zero_start for d in adapter.deltas.values())
        if shares_tensors(adapter) and (list(adapter.shared.parameters()) or not zero):
            raise PlaitError(
                f"{rule}: the sites of {adapter.method.name!r} share tensors, and what they add "
                "does not vanish where a site's own go back to their start; use a method such as "
                "lora."
            )


def _forget(optimizer: Any, parameter: nn.Parameter) -> None:
    if optimizer is not None:
        getattr(optimizer, "optimizer", optimizer).state.pop(parameter, None)
