"""How much units matter: what the loss would change without them, their size, or chance.

    first     |w g|                  g = dL/dw, the mean over the data
    second    |w^2 h|                h = the mean of g_n^2 over batches n (diagonal Fisher)
    mixed     |w g - w^2 h / 2|      Taylor's expansion of L at w = 0, to second order

An entry's importance is summed over the unit's rows or columns in every weight of its group
("element"), or the signed sum of each row is taken first and its size then ("vector"). The weights
of a group are put together by sum, product, maximum, or the last one counts alone.
Ma, Fang and Wang, "LLM-Pruner", 2023, arXiv 2305.11627. `LoraGradient` is LoRAPrune's estimate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plait.adapter import Pair, Site
from plait.adapter.choices import check_choices
from plait.adapter.site import TransposedLinearSite, make_parameter_site, make_site
from plait.adapter.state import find_state
from plait.errors import PlaitError, unknown
from plait.rules._lora_gradient import along_dims, entry_importance, unit_scores
from plait.statistics import gradient_pass
from plait.statistics.frozen import frozen, to_device
from plait.statistics.gradients import Loss
from plait.structure import Group

Batches = Sequence[Mapping[str, Any]]
Aggregate = Literal["sum", "prod", "max", "last"]


class Importance:
    """Scores units. Subclasses are dataclasses whose fields are the options."""

    needs_data = True

    def scores(
        self, model: nn.Module, groups: Sequence[Group], data: Batches, loss: Loss | None
    ) -> dict[str, Tensor]:
        """{group: [size], higher is more important}, float64 on the CPU."""
        raise NotImplementedError


class _Entries(Importance):
    """What scores the entries of weights first."""

    level: str = "element"
    aggregate: Aggregate = "sum"

    def entries(
        self, model: nn.Module, sites: Mapping[str, Site], data: Batches, loss: Loss | None
    ) -> Iterator[tuple[str, Tensor]]:
        """(weight, the importance of its entries as they are stored, signed)."""
        raise NotImplementedError

    def scores(
        self, model: nn.Module, groups: Sequence[Group], data: Batches, loss: Loss | None
    ) -> dict[str, Tensor]:
        check_choices(self, type(self).__name__)
        sites = _weights(model, groups)
        wanted: dict[str, set[int]] = {}
        for group in groups:
            for slot in group.slots:
                wanted.setdefault(slot.tensor, set()).add(slot.dim)
        vectors: dict[str, dict[int, Tensor]] = {}
        for name, found in self.entries(model, sites, data, loss):
            vectors[name] = {d: _along(found, d, self.level) for d in wanted[name]}
        return {group.name: self._together(group, vectors) for group in groups}

    def _together(self, group: Group, vectors: Mapping[str, Mapping[int, Tensor]]) -> Tensor:
        parts = torch.stack(
            [
                slot.gather(vectors[slot.tensor][slot.dim], group.size)
                for slot in group.slots
                if slot.tensor in vectors
            ]
        )
        if self.aggregate == "last":
            return parts[-1]
        if self.aggregate == "max":
            return parts.amax(0)
        return parts.sum(0) if self.aggregate == "sum" else parts.prod(0)


def _along(values: Tensor, dim: int, level: str) -> Tensor:
    others = [d for d in range(values.dim()) if d != dim]
    values = values.double()
    if not others:
        return values.abs()
    return values.sum(others).abs() if level == "vector" else values.abs().sum(others)


def _weights(model: nn.Module, groups: Sequence[Group]) -> dict[str, Site]:
    """{weight: its site}; biases and buffers have no say."""
    found: dict[str, Site] = {}
    for group in groups:
        for slot in group.slots:
            path, _, leaf = slot.tensor.rpartition(".")
            module = model.get_submodule(path)
            if leaf == "bias" or leaf not in module._parameters or slot.tensor in found:
                continue
            site = make_site(path, module) if leaf == "weight" else None
            found[slot.tensor] = site or make_parameter_site(slot.tensor, module, leaf)
    return found


def stored(site: Site, canonical: Tensor) -> Tensor:
    """A canonical weight as its module stores it."""
    return canonical if site.kind == "parameter" else site.replacement(canonical)


@dataclass
class Taylor(_Entries):
    """What the loss would change, by its derivatives on the data (LLM-Pruner)."""

    order: Literal["first", "second", "mixed"] = "mixed"
    """Derivatives that count."""
    level: Literal["element", "vector"] = "element"
    """Entries one by one, or each row's signed sum."""
    aggregate: Aggregate = "sum"
    """How the weights of a group are put together (the paper's default: sum)."""

    def entries(
        self, model: nn.Module, sites: Mapping[str, Site], data: Batches, loss: Loss | None
    ) -> Iterator[tuple[str, Tensor]]:
        here = list(sites.values())
        active = dict(state.active) if (state := find_state(model)) is not None else {}
        if self.order == "first":
            mean = gradient_pass(model, here, data, loss, active=active)
            squares: dict[str, Tensor] = {}
        else:
            passes = (gradient_pass(model, here, [b], loss, active=active) for b in data)
            mean, squares = _moments(passes)
        for name, site in sites.items():
            w = site.weight().detach().float().cpu()
            g = mean[site.path]
            value = w * g if self.order != "second" else torch.zeros_like(w)
            if self.order != "first":
                curved = w.square() * squares[site.path]
                value = curved if self.order == "second" else value - curved / 2
            yield name, stored(site, value)


def _moments(passes: Iterator[dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Means of the batches' gradients and of their squares."""
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    count = 0
    for found in passes:
        count += 1
        for path, g in found.items():
            if path not in sums:
                sums[path], squares[path] = torch.zeros_like(g), torch.zeros_like(g)
            sums[path] += g
            squares[path].addcmul_(g, g)
    for total in (*sums.values(), *squares.values()):
        total.div_(count)
    return sums, squares


@dataclass
class Magnitude(_Entries):
    """The size of a unit's weights: sums of |w|^norm. No data is looked at."""

    norm: float = 2.0
    aggregate: Aggregate = "sum"
    """How the weights of a group are put together."""

    needs_data = False

    def entries(
        self, model: nn.Module, sites: Mapping[str, Site], data: Batches, loss: Loss | None
    ) -> Iterator[tuple[str, Tensor]]:
        for name, site in sites.items():
            yield name, stored(site, site.weight().detach().float().cpu().abs() ** self.norm)


@dataclass
class Random(Importance):
    """Chance: the bar that any other importance has to clear."""

    seed: int = 0

    needs_data = False

    def scores(
        self, model: nn.Module, groups: Sequence[Group], data: Batches, loss: Loss | None
    ) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(self.seed)
        return {g.name: torch.rand(g.size, generator=draw, dtype=torch.float64) for g in groups}


@dataclass
class LoraGradient(Importance):
    """LoRAPrune's estimate from the gradients of the active adapter's (A, B) pairs alone."""

    def scores(
        self, model: nn.Module, groups: Sequence[Group], data: Batches, loss: Loss | None
    ) -> dict[str, Tensor]:
        state = find_state(model)
        adapters = [] if state is None else [state.adapters[name] for name in state.active]
        pairs = [pair for adapter in adapters for pair in adapter.pairs()]
        if not pairs:
            raise PlaitError(
                "importance 'lora' reads gradients of an active adapter's (A, B) pairs; load one."
            )
        vectors: dict[str, dict[int, Tensor]] = {}
        with _gradients(model, dict(state.active) if state else {}, pairs, data, loss):
            for pair in pairs:
                importance = entry_importance(pair)
                if importance is not None and pair.delta.site.kind == "linear":
                    turned = isinstance(pair.delta.site, TransposedLinearSite)
                    vectors |= along_dims(pair.path, importance, turned)
        found = unit_scores(groups, vectors)
        for group in groups:
            if group.name not in found:
                raise PlaitError(f"the active adapter has no pair at the layers of {group.name!r}.")
        return found


@contextmanager
def _gradients(
    model: nn.Module, active: Any, pairs: Sequence[Pair], data: Batches, loss: Loss | None
) -> Iterator[None]:
    """Within the block the pairs have the mean loss's gradients; afterwards what they had."""
    tensors = [tensor for pair in pairs for tensor in (pair.A, pair.B)]
    before = [tensor.grad for tensor in tensors]
    with frozen(model, active) as device, torch.enable_grad():
        try:
            for tensor in tensors:
                tensor.grad = None
                tensor.requires_grad_(True)
            for raw in data:
                batch = to_device(raw, device)
                value = loss(model, batch) if loss is not None else model(**batch).loss
                (value / len(data)).backward()
            yield
        finally:
            for tensor, gradient in zip(tensors, before, strict=True):
                tensor.requires_grad_(False)
                tensor.grad = gradient


IMPORTANCES: dict[str, type[Any]] = {
    "taylor": Taylor,
    "magnitude": Magnitude,
    "random": Random,
    "lora": LoraGradient,
}


def make_importance(spec: str | Importance) -> Importance:
    """An importance from its name (defaults), or an instance."""
    if isinstance(spec, Importance):
        return spec
    if spec not in IMPORTANCES:
        raise unknown("importance", spec, IMPORTANCES)
    made: Importance = IMPORTANCES[spec]()
    return made
