"""Another adapter for every row of the batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plait import kernels
from plait.adapter.activation import base_weights, install_plans, refuse_fused
from plait.adapter.adapter import Adapter
from plait.adapter.delta import Delta
from plait.adapter.site import first_input
from plait.adapter.state import get_state
from plait.errors import PlaitError


@contextlib.contextmanager
def per_row(model: nn.Module, rows: Sequence[str | None]) -> Iterator[None]:
    """Within the block, row i of the batch goes through adapter `rows[i]` (None: the base).

    Low-rank adapters on linear layers share one base product and one planned product over all
    rows; others run on their own rows. Raises PlaitError for adapters that change weights for the
    whole batch, and when the batch has another number of rows.
    """
    state = get_state(model)
    refuse_fused(state, "per_row")
    names = list(dict.fromkeys(r for r in rows if r is not None))
    adapters = [state.adapter(name) for name in names]
    for adapter in adapters:
        _refuse_in_rows(adapter)
    batch = _Batch(rows, names)
    plans = [(m, _plan(found, batch)) for m, found in _by_module(adapters).items()]
    before = state.installed
    with base_weights(model):
        install_plans(state, plans)
        try:
            yield
        finally:
            install_plans(state, before)


def _refuse_in_rows(adapter: Adapter) -> None:
    for delta in adapter.deltas.values():
        if delta.traits.edits_base or delta.site.kind == "parameter":
            raise PlaitError(
                f"adapter {adapter.name!r} ({adapter.method.name}) changes weights for the whole "
                f"batch at {delta.site.path!r} and cannot serve single rows; convert it with "
                "to_lora()."
            )


def _by_module(adapters: Sequence[Adapter]) -> dict[nn.Module, dict[str, Delta]]:
    found: dict[nn.Module, dict[str, Delta]] = {}
    for adapter in adapters:
        for delta in adapter.deltas.values():
            found.setdefault(delta.site.base, {})[adapter.name] = delta
    return found


class _Batch:
    """Which row belongs to whom; the kernels' plans are made once a step, for all sites."""

    def __init__(self, rows: Sequence[str | None], names: Sequence[str]) -> None:
        self.size, self.names = len(rows), list(names)
        numbers = {name: i for i, name in enumerate(names)}
        self.ids = torch.tensor([-1 if r is None else numbers[r] for r in rows])
        self._plans: dict[tuple[int, tuple[str, ...]], Any] = {}

    def rows_of(self, name: str) -> Tensor:
        return (self.ids == self.names.index(name)).nonzero().flatten()

    def check(self, x: Tensor, path: str) -> None:
        if x.shape[0] != self.size:
            raise PlaitError(
                f"per_row names {self.size} rows, but the batch at {path!r} has {x.shape[0]}; give "
                "one adapter name (or None) per row."
            )

    def token_plan(self, tokens: int, present: tuple[str, ...], device: torch.device) -> Any:
        """The plan of [rows * tokens] positions among the adapters that act on a site."""
        key = (tokens, present)
        if key not in self._plans:
            number = {self.names.index(name): i for i, name in enumerate(present)}
            ids = torch.tensor([number.get(i, -1) for i in self.ids.tolist()], device=device)
            self._plans[key] = kernels.plan_rows(ids.repeat_interleave(tokens), len(present))
        return self._plans[key]


def _plan(deltas: Mapping[str, Delta], batch: _Batch) -> Any:
    fused = all(d.traits.low_rank and d.site.kind == "linear" for d in deltas.values())
    return _FusedRows(deltas, batch) if fused else _Rows(deltas, batch)


class _Rows:
    """Each adapter's change on its own rows."""

    def __init__(self, deltas: Mapping[str, Delta], batch: _Batch) -> None:
        self.deltas, self.batch = dict(deltas), batch
        self.site = next(iter(deltas.values())).site
        self.index = {name: batch.rows_of(name) for name in deltas}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = first_input(args, kwargs)
        self.batch.check(x, self.site.path)
        output = self.site.forward(*args, **kwargs)
        y = output[0] if isinstance(output, tuple) else output
        for name, delta in self.deltas.items():
            rows = self.index[name].to(y.device)
            of_rows = y.index_select(0, rows)
            seen = delta.seen(x.index_select(0, rows), of_rows)
            y = y.index_add(0, rows, delta(seen, of_rows).to(y.dtype))
        return (y, *output[1:]) if isinstance(output, tuple) else y


class _FusedRows:
    """Low-rank adapters on one linear: one base product, one planned product over all rows."""

    def __init__(self, deltas: Mapping[str, Delta], batch: _Batch) -> None:
        self.deltas, self.batch = dict(deltas), batch
        self.site = next(iter(deltas.values())).site
        self.apart = _Rows(deltas, batch)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        x = first_input(args, kwargs)
        if any(d.dropout for d in self.deltas.values()):
            return self.apart(x)  # each adapter draws its own mask
        self.batch.check(x, self.site.path)
        y = self.site.forward(x)
        tokens = x.shape[:-1].numel() // max(x.shape[0], 1)
        plan = self.batch.token_plan(tokens, tuple(self.deltas), x.device)
        lows = [d.factors() for d in self.deltas.values()]
        As, Bs, scales = zip(*((f.A, f.B, f.scale) for f in lows if f is not None), strict=True)
        flat = kernels.multi_lora_(
            y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), plan, As, Bs, scales
        )
        return flat.view(y.shape)
