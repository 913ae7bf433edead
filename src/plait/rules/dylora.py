"""DyLoRA: one training for all ranks: whatever rank it is cut to afterwards, the adapter works.

    dW_b = (alpha / b) B[:, :b] A[:b]        b drawn anew for each step, one for all sites

A [r, in], B [out, r]. A step runs on the leading b components alone. With `frozen` only component b
moves, the others stay bit for bit, in what the optimiser remembers of them too: a gradient of 0
would leave them to momentum and decay. Otherwise all b of them move, and those beyond stay.
Evaluation is at full rank; `truncate(adapter, b)` gives the plain LoRA of any lower one.
Departure: the authors' code leaves components without a gradient to the optimiser.
Paper: Valipour et al., 2022, arXiv 2210.07558. Parameters: r (in + out) a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

from plait.adapter import Adapter, Method, PairDelta, Rule, Run, build_adapter, get_method, per_site
from plait.adapter.choices import check_choices
from plait.adapter.seeds import generator
from plait.errors import PlaitError
from plait.rules._hold import Held, Moving
from plait.rules._nested import NestedDelta, NestedOptions, nested_count


@dataclass
class Dylora(Rule):
    frozen: bool = True
    """Move component b alone (the released training); False moves all b leading ones."""
    distribution: Literal["uniform", "geometric"] = "uniform"
    """Of b; "geometric" prefers low ranks."""
    stop: float = 0.15
    """Of the geometric distribution: b + 1 is 1 - stop times as frequent as b."""
    lowest: int = 1
    """The least rank drawn."""

    claims = frozenset({"ranks"})

    def __post_init__(self) -> None:
        check_choices(self, "dylora")
        if not 0 < self.stop < 1:
            raise PlaitError(f"dylora: stop must lie in (0, 1), not {self.stop}.")

    def check(self, run: Run) -> None:
        super().check(run)
        most = max((d.rank for d in list(run.deltas(NestedDelta).values())), default=0)
        if not 1 <= self.lowest <= most:
            raise PlaitError(
                f"dylora: lowest is {self.lowest}, but the nested ranks go up to {most}; attach "
                "method dylora with a rank of at least that."
            )

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._deltas, self._held = list(run.deltas(NestedDelta).values()), Held()
        self._most = max(d.rank for d in self._deltas)
        self._handle: Any = run.model.register_forward_pre_hook(self._narrow)

    def width(self, step: int) -> int:
        """b of the step that follows `step` done ones, from the seed alone."""
        stream = generator(self.run.seed, "rule", "dylora", str(step))
        weights = torch.ones(self._most - self.lowest + 1, dtype=torch.float64)
        if self.distribution == "geometric":
            weights = (1 - self.stop) ** torch.arange(len(weights), dtype=torch.float64)
        return self.lowest + int(torch.multinomial(weights, 1, generator=stream))

    def _narrow(self, module: nn.Module, _: Any) -> None:
        """Passes that train are at rank b, all others at full rank."""
        training = module.training and torch.is_grad_enabled()
        self._set(self.width(self.run.step) if training else None)

    def _set(self, leading: int | None) -> None:
        for delta in self._deltas:
            delta.leading, delta.last_only = leading, self.frozen

    def before_step(self) -> None:
        b, moving = self.width(self.run.step), []
        for delta in self._deltas:
            last = min(b, delta.rank)
            first = min(b - 1, last) if self.frozen else 0
            for name, axis in delta.rank_axes().items():
                moving.append(Moving(delta.get_parameter(name), axis, first, last))
        self._held.take(moving, self.run.optimizer)

    def after_step(self) -> None:
        self._held.put_back(self.run.optimizer)
        self._set(None)

    def finish(self) -> None:
        self._handle.remove()
        self._set(None)


def truncate(adapter: Adapter, rank: int) -> Adapter:
    """A plain LoRA of the leading `rank` components of a DyLoRA adapter, attached to nothing.

    Its scaling is alpha / rank, as in training; sites of lower rank keep theirs. The adapter itself
    stays as it is. Raises PlaitError for a rank it does not reach, or deltas of other methods.
    """
    found = {path: d for path, d in adapter.deltas.items() if isinstance(d, NestedDelta)}
    most = max((d.rank for d in found.values()), default=0)
    if len(found) < len(adapter.deltas) or not 1 <= rank <= most:
        raise PlaitError(
            f"adapter {adapter.name!r} cannot be cut to rank {rank}: it needs dylora's deltas alone"
            f", and a rank from 1 to {most}."
        )
    lora: Any = get_method("lora")
    options = {path: lora.options(**d.plain_options(rank)) for path, d in found.items()}
    made = build_adapter(
        adapter.name,
        lora,
        [(d.site.bare(), lora.delta) for d in found.values()],
        next(iter(options.values())),
        by_site=options,
        seed=adapter.seed,
        dtype=next(iter(found.values())).A.dtype,
        info={**adapter.info, "cut_from": {"method": adapter.method.name, "rank": most}},
    )
    for path, delta in found.items():
        low = delta.cut(rank)
        cast(PairDelta, made.deltas[path]).set_pair(low.A, low.B)
    return made


METHOD = Method(
    name="dylora",
    title="DyLoRA: nested ranks, one training for all of them",
    paper="Valipour et al., 2022, arXiv 2210.07558",
    axis="parameterisation",
    options=NestedOptions,
    delta=NestedDelta,
    rule=Dylora,
    count=per_site(nested_count),
)
