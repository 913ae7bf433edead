"""Several LoRA linears that read the same x (q, k, v; gate, up) as one autograd node.

    x ──► W_i x + b_i + scale_i * B_i (A_i drop(x)),   i = 1..n

One stacked product for all A_i, one dropout mask, one saved x; in backward one product for all
dA_i, and dx is accumulated in place over the members, where autograd would add n tensors of x's
size. A member without factors (None or rank 0) is a bare linear that shares the accumulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from plait.kernels import dispatch, reference
from plait.kernels._gate import compute_dtype, exact_dtypes, plain_path
from plait.kernels._lowrank import fold_plan, gain, gradient_of_b, project, pull_back, push_back
from plait.kernels.dropout import Dropout, make_dropout


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    As: Sequence[Tensor | None],
    Bs: Sequence[Tensor | None],
    scales: Sequence[float],
    *,
    dropout: float = 0.0,
    seed: int | None = None,
) -> tuple[Tensor, ...]:
    """x W_i^T + b_i + scale_i * (drop(x) A_i^T) B_i^T for every i, in one autograd node.

    The members share one dropout mask (separate `lora_linear` calls with one seed draw that same
    mask). Ranks and output widths may differ; A_i = B_i = None makes member i a bare linear. The
    other promises and fallbacks are those of `lora_linear`; one trained weight or bias sends the
    whole group to the plain path.

    Returns:
        One [..., out_i] tensor a member. A member whose output gets no gradient costs nothing in
        backward, and its factors' gradients are None.
    """
    grad = torch.is_grad_enabled()
    trained = grad and any(t is not None and t.requires_grad for t in (*weights, *biases))
    if trained or plain_path(x, *weights, *As, *Bs):
        return reference.lora_linear_group(
            x, weights, biases, As, Bs, scales, dropout=dropout, seed=seed
        )
    drop = make_dropout(dropout, seed)
    run = dispatch.find("lora_linear_group", x.device.type)
    if run is not None:
        return run(x, weights, biases, As, Bs, scales, drop)
    dtype = compute_dtype(x, *weights)
    factors = (*As, *Bs)
    if grad and (x.requires_grad or any(t is not None and t.requires_grad for t in factors)):
        return _LoraGroup.apply(x, weights, biases, scales, drop, dtype, *factors)
    with exact_dtypes(x.device.type):
        return _products(x.to(dtype), weights, biases, As, Bs, scales, drop)[0]


def _stack(As: Sequence[Tensor | None], dtype: torch.dtype) -> tuple[Tensor | None, list[slice]]:
    """(the stacked A [R, in] or None where no member has factors, each member's rows of it)."""
    rows, top = [], 0
    for A in As:
        rank = 0 if A is None else A.shape[0]
        rows.append(slice(top, top + rank))
        top += rank
    present = [A.to(dtype) for A in As if A is not None and A.shape[0]]
    return (torch.cat(present) if present else None), rows


def _products(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    As: Sequence[Tensor | None],
    Bs: Sequence[Tensor | None],
    scales: Sequence[float],
    drop: Dropout | None,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """(outputs, the stacked u [R, T]), in the dtype of x."""
    dtype = x.dtype
    stacked, rows = _stack(As, dtype)
    u = None if stacked is None else project(x.reshape(-1, x.shape[-1]), stacked, drop)
    outputs = []
    for weight, bias, B, mine, scale in zip(weights, biases, Bs, rows, scales, strict=True):
        y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        if u is not None and B is not None and B.shape[1]:
            flat = y.view(-1, y.shape[-1])
            flat.addmm_(u[mine].t(), B.to(dtype).t(), alpha=gain(scale, drop))
        outputs.append(y)
    return tuple(outputs), u


def _folded(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
) -> tuple[tuple[Tensor, ...], Tensor, list[Tensor]]:
    """(outputs, the stacked u, every W_i + scale_i B_i A_i), in the dtype of x."""
    dtype = x.dtype
    u = project(x.reshape(-1, x.shape[-1]), torch.cat([A.to(dtype) for A in As]), None)
    outputs, totals = [], []
    for weight, bias, A, B, scale in zip(weights, biases, As, Bs, scales, strict=True):
        totals.append(torch.addmm(weight, B.to(dtype), A.to(dtype), alpha=scale))
        outputs.append(F.linear(x, totals[-1], None if bias is None else bias.to(dtype)))
    return tuple(outputs), u, totals


class _LoraGroup(Function):
    @staticmethod
    def forward(ctx: Any, x, weights, biases, scales, drop, dtype, *factors):
        count = len(weights)
        As, Bs = factors[:count], factors[count:]
        inputs = x.to(dtype)
        fold, keep = fold_plan(inputs, weights, As, drop)
        with exact_dtypes(x.device.type):
            if fold:
                outputs, stacked_u, totals = _folded(inputs, weights, biases, As, Bs, scales)
                u: Tensor | None = stacked_u
                weights = totals if keep else weights
            else:
                outputs, u = _products(inputs, weights, biases, As, Bs, scales, drop)
        need_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[-2 * count :]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            inputs if any(needs[:count]) else None,
            u if any(needs[count:]) else None,
            *(weights if need_x else [None] * count),
            *factors,
        )
        ctx.settings = ([gain(scale, drop) for scale in scales], drop, keep, x.shape, x.dtype)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None):
        count = len(grads)
        x, u, *rest = ctx.saved_tensors
        weights, As, Bs = rest[:count], rest[count:-count], rest[-count:]
        gains, drop, whole, x_shape, x_dtype = ctx.settings
        need_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[-2 * count :]
        # A member whose output was not used takes no part: neither in dx nor in the stack.
        flat = [None if g is None else g.reshape(-1, g.shape[-1]) for g in grads]
        live = next((g for g in flat if g is not None), None)
        if live is None:
            return (None,) * (6 + 2 * count)
        grad_x = None
        with exact_dtypes(live.device.type):
            used = [None if g is None else A for g, A in zip(flat, As, strict=True)]
            stacked, rows = _stack(used, live.dtype)
            du = None
            if stacked is not None and ((need_x and not whole) or x is not None):
                du = live.new_empty(stacked.shape[0], live.shape[0])
            grad_bs = _pull_back(flat, u, As, Bs, gains, needs[count:], du)
            if need_x:
                grad_x = _base_gradient(flat, weights)
            grad_as: list[Tensor | None] = [None] * count
            if du is not None and stacked is not None:
                inputs = None if x is None else x.reshape(-1, x_shape[-1])
                # The kept sums W_i + s_i B_i A_i have given the whole of grad_x already.
                grad_a = push_back(du, stacked, inputs, None if whole else grad_x, drop)
                if grad_a is not None:
                    grad_as = [
                        None if A is None else grad_a[mine].to(A.dtype)
                        for A, mine in zip(used, rows, strict=True)
                    ]
        if grad_x is not None:
            grad_x = grad_x.view(x_shape).to(x_dtype)
        return grad_x, None, None, None, None, None, *grad_as, *grad_bs


def _pull_back(
    grads: Sequence[Tensor | None],
    u: Tensor | None,
    As: Sequence[Tensor | None],
    Bs: Sequence[Tensor | None],
    gains: Sequence[float],
    needs: Sequence[bool],
    du: Tensor | None,
) -> list[Tensor | None]:
    """Every dB_i (None where not needed); fills du, the stacked gradient of u, on the way.

    Member by member, so that the small products that read one g come together.
    """
    found: list[Tensor | None] = [None] * len(grads)
    top = filled = 0  # rows of u, which has every member's; rows of du, which has the used ones'
    for i, (g, A, B, alpha) in enumerate(zip(grads, As, Bs, gains, strict=True)):
        rank = 0 if A is None else A.shape[0]
        if g is not None and B is not None and rank:
            if u is not None and needs[i]:
                found[i] = gradient_of_b(u[top : top + rank], g, alpha, B.dtype)
            if du is not None:
                pull_back(B, g, alpha, out=du[filled : filled + rank])
                filled += rank
        top += rank
    return found


def _base_gradient(grads: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor:
    """sum_i g_i W_i, accumulated in one buffer."""
    pairs = [(g, W.to(g.dtype)) for g, W in zip(grads, weights, strict=True) if g is not None]
    (first, weight), *others = pairs
    total = first.mm(weight)
    for g, weight in others:
        total.addmm_(g, weight)
    return total
