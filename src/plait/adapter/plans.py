"""What an adapted module runs: one small callable, chosen when adapters are activated.

Choosing once and not per call keeps the forward free of look-ups and of branches on methods; each
plan asks only traits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plait import kernels
from plait.adapter.delta import Delta, add_change
from plait.adapter.siblings import Siblings
from plait.adapter.site import LinearSite, Site, base_class, first_input
from plait.adapter.weighting import Weight, weighted_change, weighted_dense, weighted_factors

Entry = tuple[Delta, Weight]


class Fused:
    """Low-rank deltas on a linear layer with a plain weight: one fused node."""

    siblings: Siblings | None = None

    def __init__(self, site: Site, entries: Sequence[Entry]) -> None:
        self.site, self.entries = site, list(entries)
        self.module: Any = site.base
        self.transposed = type(site) is not LinearSite
        alone = len(entries) == 1
        self.delta: Delta | None = entries[0][0] if alone else None
        self.single_weight: Weight = entries[0][1] if alone else 1.0

    @property
    def dropout(self) -> float:
        return self.entries[0][0].dropout

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A, B and scale of what is active here."""
        if self.delta is None:
            return _concatenated(self.entries)
        low = self.delta.factors()
        assert low is not None
        low = weighted_factors(low, self.single_weight)
        return low.A, low.B, low.scale

    def pieces(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor, float]:
        """Weight, bias, A, B and scale."""
        module = self.module
        return (
            module.weight.t() if self.transposed else module.weight,
            module.bias,
            *self.factors(),
        )

    def compute(self, x: Tensor, seed: int | None = None) -> Tensor:
        """The output of this linear alone."""
        return kernels.lora_linear(x, *self.pieces(), dropout=self.dropout, seed=seed)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        x = first_input(args, kwargs)
        siblings = self.siblings
        # Grouping rounds differently, and what is learned must not show in a model's answers: only
        # passes that train are grouped. A compiler fuses for itself.
        if siblings is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.compute(x)
        return siblings.run(self, x)


class Added:
    """Low-rank deltas beside a base that only shows its forward (quantised, subclassed)."""

    def __init__(self, site: Site, entries: Sequence[Entry]) -> None:
        self.site = site
        self.inner = Fused(site, entries)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        x = first_input(args, kwargs)
        y = self.site.forward(x)
        return kernels.lora_add(y, x, *self.inner.factors(), dropout=self.inner.dropout)


def _concatenated(entries: Sequence[Entry]) -> tuple[Tensor, Tensor, float]:
    known = [(delta.factors(), weight) for delta, weight in entries]
    lows = [weighted_factors(low, weight) for low, weight in known if low is not None]
    A = torch.cat([low.A for low in lows], dim=0)
    B = torch.cat([low.B * low.scale for low in lows], dim=1)
    return A, B, 1.0


class Solo:
    """One delta at full weight: its own adapted forward."""

    def __init__(self, delta: Delta) -> None:
        self.delta = delta

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.delta.adapt(*args, **kwargs)


class Stack:
    """Several deltas, or a weighted one: base + sum of weight x change."""

    def __init__(self, site: Site, entries: Sequence[Entry]) -> None:
        self.site, self.entries = site, list(entries)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = first_input(args, kwargs)
        output = self.site.forward(*args, **kwargs)

        def change(y: Tensor) -> Tensor:
            total = sum(weighted_change(d, w, d.seen(x, y), y) for d, w in self.entries)
            assert isinstance(total, Tensor)
            return total

        return add_change(output, change)


class WithParameters:
    """A module whose forward reads changed parameters (packed experts, biases)."""

    def __init__(
        self, module: nn.Module, by_name: Mapping[str, Sequence[Entry]], inner: Any
    ) -> None:
        self.module, self.by_name, self.inner = module, dict(by_name), inner

    def _live(self, name: str, entries: Sequence[Entry]) -> Tensor:
        value = self.module._parameters[name]
        assert value is not None
        total: Tensor = value
        for delta, weight in entries:
            total = total + weighted_dense(delta, weight).to(value.dtype)
        return total

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Computed once a forward: an expert loop reads the packed tensor once for each expert.
        live = {name: self._live(name, entries) for name, entries in self.by_name.items()}
        self.module.__dict__["_plait_live"] = live
        try:
            if self.inner is not None:
                return self.inner(*args, **kwargs)
            return base_class(self.module).forward(self.module, *args, **kwargs)
        finally:
            self.module.__dict__.pop("_plait_live", None)


def choose_plan(module: nn.Module, entries: Sequence[Entry]) -> Any:
    """The plan for what is active on one module, or None for the base alone."""
    active = [(d, w) for d, w in entries if isinstance(w, Tensor) or w != 0]
    named: dict[str, list[Entry]] = {}
    rest: list[Entry] = []
    for delta, weight in active:
        if delta.site.kind == "parameter":
            named.setdefault(delta.site.path.rpartition(".")[2], []).append((delta, weight))
        else:
            rest.append((delta, weight))
    inner = _plan_of_outputs(rest) if rest else None
    return WithParameters(module, named, inner) if named else inner


def _plan_of_outputs(entries: Sequence[Entry]) -> Any:
    site = entries[0][0].site
    low_rank = all(d.traits.low_rank and d.site.kind == "linear" for d, _ in entries)
    alone = len(entries) == 1
    if low_rank and (alone or _same_dropout(entries)):
        return Fused(site, entries) if _has_plain_weight(site) else Added(site, entries)
    if alone and not isinstance(entries[0][1], Tensor) and entries[0][1] == 1:
        return Solo(entries[0][0])
    return Stack(site, entries)


def _same_dropout(entries: Sequence[Entry]) -> bool:
    return len({getattr(d.options, "dropout", 0.0) for d, _ in entries}) <= 1


def _has_plain_weight(site: Site) -> bool:
    cls = base_class(site.base)
    plain = cls.forward is nn.Linear.forward or cls.__name__ == "Conv1D"
    return plain and site.weight().is_floating_point()
