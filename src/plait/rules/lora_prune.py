"""LoRAPrune: heads and channels switched off while LoRA trains, by what LoRA's gradients say.

    S <- decay S + (1 - decay) I      I = sum of (G (W + s B A))^2 over a unit, of each layer in
                                      proportion to its norm, over the layers of its group
    G = g_B A + B g_A - g_B g_A       stands in for dL/dW, of which nothing is computed
    s(t) = ratio + (start - ratio) (1 - (t - w) / (T - w - c))^3,  from w steps on, until c before T

A unit is an attention head (a key-value head with all its queries) or a channel of a feed-forward
layer, found in the model itself (`plait.structure`). Every `interval` steps the floor(n s(t)) units
of least S of each group go; what is off stays off, multiplied by 0 where it is read. The first
tenth of the blocks and the last one stay whole. The base is not written to: when training ends the
masks come off, `adapter.info["lora-prune"]["kept"]` names the units that stayed, and
`plait.compression.prune(model, keep=...)` (or `plait prune --adapter`) cuts model and adapter.
Departures: floor(n ratio) units are off in the end whatever the interval; masks stand before the
layers that read a unit, so that no bias or activation makes something of what is off.
Works with methods that train (A, B) pairs. Paper: Zhang et al., 2023, arXiv 2305.18403.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.adapter import Method, Rule, Run
from plait.adapter.site import LinearSite, TransposedLinearSite
from plait.errors import PlaitError
from plait.rules._lora_gradient import Vectors, along_dims, entry_importance, unit_scores
from plait.rules._prunable import best_units, few_rows, trained_groups
from plait.structure import Masks, find_structure


@dataclass
class LoraPrune(Rule):
    ratio: float = 0.5
    """Share of each group's units that is off at the end."""
    start: float = 0.0
    """Share that is off when pruning begins."""
    warmup: float = 0.1
    """Steps before pruning begins; a share of the run below 1."""
    cooldown: float = 0.1
    """Steps at the end in which nothing more goes; a share of the run below 1."""
    interval: int = 10
    """Steps between two prunings."""
    decay: float = 0.9
    """Of the moving average S."""
    first: float = 0.1
    """Blocks at the front that stay whole; a share of all below 1."""
    last: int = 1
    """Blocks at the end that stay whole."""

    needs_pairs = True

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.ratio < 1 or not 0 <= self.decay < 1 or self.interval < 1:
            raise PlaitError(
                "lora-prune: 0 <= start <= ratio < 1, decay lies in [0, 1), interval is at least 1."
            )

    def check(self, run: Run) -> None:
        super().check(run)
        if run.total_steps is None:
            raise PlaitError("lora-prune: the schedule needs total_steps.")
        begin, end = self._span(run)
        if begin >= end:
            raise PlaitError("lora-prune: warmup and cooldown leave no step to prune in.")

    def setup(self, run: Run) -> None:
        super().setup(run)
        structure = find_structure(run.model, few_rows(run.validation))
        self.groups = trained_groups(structure, self._pairs(), self.first, self.last)
        self.kept = {g.name: torch.ones(g.size, dtype=torch.bool) for g in self.groups}
        self.scores: dict[str, Tensor] = {}
        self._masks = Masks(run.model, structure)

    def _pairs(self) -> list[Any]:
        return [p for p in self.run.pairs() if isinstance(p.delta.site, LinearSite)]

    def _span(self, run: Run) -> tuple[int, int]:
        assert run.total_steps is not None
        return run.steps(self.warmup), run.total_steps - run.steps(self.cooldown)

    def share(self, step: int) -> float:
        """s(t): the share of units that is to be off after this step."""
        begin, end = self._span(self.run)
        if step <= begin:
            return self.start
        left = max(0.0, 1 - (step - begin) / (end - begin))
        return self.ratio + (self.start - self.ratio) * left**3

    def before_step(self) -> None:
        vectors: Vectors = {}
        for pair in self._pairs():
            importance = entry_importance(pair)
            if importance is not None:
                turned = isinstance(pair.delta.site, TransposedLinearSite)
                vectors |= along_dims(pair.path, importance, turned)
        for name, found in unit_scores(self.groups, vectors).items():
            if torch.isfinite(found).all():
                before = self.scores.get(name, torch.zeros_like(found))
                self.scores[name] = self.decay * before + (1 - self.decay) * found

    def after_step(self) -> None:
        step, (begin, end) = self.run.step, self._span(self.run)
        if step == end or (begin < step < end and step % self.interval == 0):
            for group in self.groups:
                if group.name in self.scores:
                    off = int(group.size * self.share(step) + 1e-9)
                    best = best_units(self.scores[group.name], self.kept[group.name], off)
                    self.kept[group.name] = best
            self._masks.set(self.kept)

    def finish(self) -> None:
        self._masks.close()
        kept = {n: m.nonzero()[:, 0].tolist() for n, m in self.kept.items() if not m.all()}
        for adapter in self.run.adapters:
            adapter.info["lora-prune"] = {"ratio": self.ratio, "kept": kept}

    def state_dict(self) -> dict[str, Any]:
        return {"scores": dict(self.scores), "kept": dict(self.kept)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores, self.kept = dict(state["scores"]), dict(state["kept"])
        self._masks.set({n: m for n, m in self.kept.items() if not m.all()})


METHOD = Method(
    name="lora-prune",
    title="LoRAPrune: heads and channels pruned while LoRA trains",
    paper="Zhang et al., 2023, arXiv 2305.18403",
    axis="rule",
    rule=LoraPrune,
    rule_example={"interval": 1},
)
