"""Many adapters at once: each row of a batch takes its own adapter's product.

    y[t] += scale_i * B_i (A_i x[t])   with i = ids[t], and nothing where ids[t] = -1

One contract `(x [T, in], plan, factors)` with ragged ranks, for serving, mixed training batches and
hard routing alike. The plan is made once a step by `plan_rows` and shared by all layers. Two ways
of multiplying, chosen by dtype and shape:

- *segments*: rows sorted by adapter (or already in runs), two products an adapter;
- *concatenated*: one product with all active A stacked, entries of other rows' adapters masked out,
  one product with all B. More arithmetic, fewer and larger products: what bf16 decoding likes.

Gathering each row's factors for a batched product reads T times r (in + out) numbers and is never
the right way on a CPU. Idea: Chen et al., Punica, 2023, arXiv 2310.18547 (segmented products).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from plait.kernels import dispatch, reference
from plait.kernels._gate import compute_dtype, exact_dtypes, plain_path


class Span(NamedTuple):
    """Rows start..stop-1 (of the sorted rows, where there is an order) belong to `adapter`."""

    adapter: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class RowPlan:
    """Which rows belong to which adapter: made by `plan_rows`, shared by every layer of a step.

    Attributes:
        ids: [T], each row's adapter or -1.
        active: the adapters that occur, ascending.
        spans: their rows; an adapter may have several spans where the rows are not sorted.
        order: the rows' indices sorted by adapter (those without one left out), or None where the
            rows come in so few runs that they are used in place.
    """

    ids: Tensor
    active: tuple[int, ...]
    spans: tuple[Span, ...]
    order: Tensor | None
    _masks: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    def mask(self, ranks: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """[T, sum(ranks)]: 1 where a column of the stacked factors is the row's own adapter's."""
        key = (ranks, dtype)
        if key not in self._masks:
            device = self.ids.device
            owner = torch.repeat_interleave(
                torch.tensor(self.active, device=device), torch.tensor(ranks, device=device)
            )
            self._masks[key] = (self.ids.unsqueeze(1) == owner).to(dtype)
        return self._masks[key]


def plan_rows(ids: Tensor, num_adapters: int) -> RowPlan:
    """Sort the rows of a step by adapter, once for all layers.

    Args:
        ids: [T] integers, the adapter of each row in 0..num_adapters-1, or -1 for none.
        num_adapters: how many adapters the factors' lists will hold.
    """
    if ids.dim() != 1 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"ids must be a vector of integers, got {ids.dtype} {tuple(ids.shape)}")
    values, counts = (t.tolist() for t in torch.unique_consecutive(ids, return_counts=True))
    if values and not (min(values) >= -1 and max(values) < num_adapters):
        raise ValueError(
            f"ids must lie in -1..{num_adapters - 1}, got {min(values)}..{max(values)}"
        )
    active = tuple(sorted(set(values) - {-1}))
    order = None
    if sum(v >= 0 for v in values) > 2 * len(active):
        order = torch.argsort(ids, stable=True)
        totals = dict.fromkeys(sorted(set(values)), 0)
        for value, count in zip(values, counts, strict=True):
            totals[value] += count
        order = order[totals.pop(-1, 0) :]
        values, counts = list(totals), list(totals.values())
    spans, top = [], 0
    for value, count in zip(values, counts, strict=True):
        if value >= 0:
            spans.append(Span(value, top, top + count))
        top += count
    return RowPlan(ids, active, tuple(spans), order)


class PackedFactors(NamedTuple):
    """The active adapters' factors side by side, for the concatenated product.

    A: [R, in]; B: [out, R] with the scales multiplied in; ranks: one an active adapter.
    """

    A: Tensor
    B: Tensor
    ranks: tuple[int, ...]


def pack_factors(
    active: Sequence[int],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
    dtype: torch.dtype,
) -> PackedFactors:
    """Copy the active adapters' factors into one pair; keep it while the active set stays."""
    return PackedFactors(
        torch.cat([As[i].to(dtype) for i in active]),
        torch.cat([(Bs[i] * scales[i]).to(dtype) for i in active], dim=1),
        tuple(As[i].shape[0] for i in active),
    )


def multi_lora_(
    y: Tensor,
    x: Tensor,
    plan: RowPlan,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
    *,
    packed: PackedFactors | None = None,
) -> Tensor:
    """Add each row's own adapter product into y in place, and return y.

    Differentiable once in y, x and every active factor (inactive ones get no gradient). Under
    `use_reference()`, compilers and functorch the sum is out of place: use the returned tensor.

    Args:
        y: [T, out], a temporary (with gradients wanted, not a leaf that requires them).
        x: [T, in].
        plan: of T rows, from `plan_rows`.
        As: A [r_i, in] of every adapter; Bs: B [out, r_i]; scales: their factors.
        packed: `pack_factors(plan.active, ...)` kept by the caller, which saves copying the factors
            in every step of generation; used where the concatenated product is chosen, that is
            for half-precision rows without gradients.
    """
    if plain_path(y, x):
        return reference.multi_lora(y, x, plan.ids, As, Bs, scales)
    if not plan.active:
        return y
    run = dispatch.find("multi_lora_", x.device.type)
    if run is not None:
        return run(y, x, plan, As, Bs, scales, packed)
    dtype = compute_dtype(x)
    factors = [t for i in plan.active for t in (As[i], Bs[i])]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, *factors)):
        gains = [scales[i] for i in plan.active]
        return _MultiLora.apply(y, x, plan, gains, dtype, *factors)
    with exact_dtypes(x.device.type):
        rank = sum(As[i].shape[0] for i in plan.active)
        arithmetic = 2 * rank * x.shape[0] * (x.shape[1] + y.shape[1])
        if concatenate(dtype, arithmetic, len(plan.spans)):
            packed = packed or pack_factors(plan.active, As, Bs, scales, dtype)
            return _concatenated(y, x.to(dtype), plan, packed)
        pairs = {i: (As[i].to(dtype), (Bs[i] * scales[i]).to(dtype)) for i in plan.active}
        return _segments(y, x.to(dtype), plan, pairs)[0]


def concatenate(dtype: torch.dtype, arithmetic: int, spans: int) -> bool:
    """Whether one masked product beats a pair of products a span, on a CPU.

    A bf16 or fp16 product of a few rows costs 40 to 150 us whatever its size, in which time a large
    one does 8 million multiplications and more; the fixed cost of an fp32 product is a few us.

    Args:
        arithmetic: floating-point operations of the concatenated products, 2 T R (in + out).
        spans: how many pairs of products the segments take.
    """
    return dtype in (torch.bfloat16, torch.float16) and arithmetic <= 8_000_000 * spans


def _concatenated(y: Tensor, x: Tensor, plan: RowPlan, packed: PackedFactors) -> Tensor:
    u = x.mm(packed.A.t()).mul_(plan.mask(packed.ranks, x.dtype))
    if y.dtype == x.dtype:
        return y.addmm_(u, packed.B.t())
    return y.add_(u.mm(packed.B.t()))


def _segments(
    y: Tensor, x: Tensor, plan: RowPlan, pairs: dict[int, tuple[Tensor, Tensor]]
) -> tuple[Tensor, list[Tensor]]:
    """(y, u [r, rows] of every span)."""
    direct = plan.order is None and y.dtype == x.dtype
    rows = x if plan.order is None else x.index_select(0, plan.order)
    delta = None if direct else rows.new_empty(rows.shape[0], y.shape[1])
    if delta is not None and plan.order is None:
        delta.zero_()  # rows without an adapter lie between the spans
    us = []
    for adapter, start, stop in plan.spans:
        A, B = pairs[adapter]
        us.append(A.mm(rows[start:stop].t()))
        if delta is None:
            y[start:stop].addmm_(us[-1].t(), B.t())
        else:
            torch.mm(us[-1].t(), B.t(), out=delta[start:stop])
    if delta is not None:
        _scatter(y, delta.to(y.dtype), plan)
    return y, us


def _scatter(total: Tensor, part: Tensor, plan: RowPlan) -> Tensor:
    if plan.order is None:
        return total.add_(part)
    return total.index_add_(0, plan.order, part)


class _MultiLora(Function):
    @staticmethod
    def forward(ctx: Any, y, x, plan, gains, dtype, *factors):
        As, Bs = factors[0::2], factors[1::2]
        pairs = {
            i: (A.to(dtype), (B * gain).to(dtype))
            for i, A, B, gain in zip(plan.active, As, Bs, gains, strict=True)
        }
        ctx.mark_dirty(y)
        inputs = x.to(dtype)
        with exact_dtypes(x.device.type):
            y, us = _segments(y, inputs, plan, pairs)
        ctx.save_for_backward(inputs, *factors, *us)
        ctx.settings = (plan, gains, dtype, x.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        plan, gains, dtype, x_dtype = ctx.settings
        x, *rest = ctx.saved_tensors
        factors, us = rest[: 2 * len(plan.active)], rest[2 * len(plan.active) :]
        needs = ctx.needs_input_grad[5:]
        g, xs = grad.to(dtype), x
        if plan.order is not None:
            g, xs = g.index_select(0, plan.order), x.index_select(0, plan.order)
        gx = g.new_zeros(xs.shape) if ctx.needs_input_grad[1] else None
        found: list[Tensor | None] = [None] * len(factors)
        with exact_dtypes(g.device.type):
            for (adapter, start, stop), u in zip(plan.spans, us, strict=True):
                at = plan.active.index(adapter)
                A, B = factors[2 * at], factors[2 * at + 1]
                rows, gain = g[start:stop], gains[at]
                du = (B * gain).to(dtype).t().mm(rows.t())
                if gx is not None:
                    torch.mm(du.t(), A.to(dtype), out=gx[start:stop])
                if needs[2 * at]:
                    _collect(found, 2 * at, du.mm(xs[start:stop]).to(A.dtype))
                if needs[2 * at + 1]:
                    _collect(found, 2 * at + 1, (u.mm(rows) * gain).to(B.dtype).t())
        if gx is not None and plan.order is not None:
            gx = gx.new_zeros(x.shape).index_copy_(0, plan.order, gx)
        grad_x = None if gx is None else gx.to(x_dtype)
        return grad if ctx.needs_input_grad[0] else None, grad_x, None, None, None, *found


def _collect(found: list[Tensor | None], at: int, part: Tensor) -> None:
    """An adapter may own several spans of rows."""
    before = found[at]
    found[at] = part if before is None else before + part
