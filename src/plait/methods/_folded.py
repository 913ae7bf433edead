"""Linears whose weight is W + dW for a dW of full rank: one product forward, and dW is not kept.

    y = x (W + dW)^T + b        dx = g (W + dW)        G = g^T x, handed on to dW's parameters

dW is made from its parameters and dropped; backward makes it again, unless W + dW is no larger than
x or y. A token then costs what it costs the base, and in backward the product G.
In half precision the sum would round dW away: there W and dW are multiplied apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from plait.adapter import Site
from plait.adapter.site import base_class
from plait.kernels._gate import compute_dtype, exact_dtypes, plain_path


class Change(Protocol):
    """dW as a function of parameters."""

    @property
    def make(self) -> Callable[..., Tensor]:
        """dW [out, in], from the parameters."""

    @property
    def pull(self) -> Callable[..., tuple[Tensor, ...]]:
        """The parameters' gradients, from that of dW and the parameters."""


def folded_linear(
    x: Tensor,
    change: Change,
    parameters: Sequence[Tensor],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x (W + dW)^T + b [..., out] for x [..., in]; x dW^T alone without `weight`."""
    trained = any(t is not None and t.requires_grad for t in (weight, bias))
    if trained or plain_path(x, weight, *parameters):
        y = F.linear(x, change.make(*parameters).to(compute_dtype(x)))
        return y if weight is None else y + F.linear(x, weight, bias)
    dtype = compute_dtype(x) if weight is None else compute_dtype(x, weight)
    return _Folded.apply(x, weight, bias, change, dtype, *parameters)


def has_plain_weight(site: Site) -> bool:
    """Whether the base's product is F.linear with `site.weight()`, so that it may be replaced."""
    cls = base_class(site.base)
    plain = cls.forward is nn.Linear.forward or cls.__name__ == "Conv1D"
    return plain and site.weight().is_floating_point()


def _total(
    weight: Tensor | None, change: Change, parameters: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """(what x is multiplied with first, what is added apart) in `dtype`."""
    dense = change.make(*parameters)
    if weight is None:
        return dense.to(dtype), None
    if dtype in (torch.float32, torch.float64) and weight.dtype == dtype:
        return weight + dense.to(dtype), None
    return weight.to(dtype), dense.to(dtype)


class _Folded(Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, change, dtype, *parameters):
        inputs = x.to(dtype)
        with exact_dtypes(x.device.type):
            total, apart = _total(weight, change, parameters, dtype)
            y = F.linear(inputs, total, None if bias is None else bias.to(dtype))
            if apart is not None:
                flat = inputs.reshape(-1, x.shape[-1])
                y.view(-1, y.shape[-1]).addmm_(flat, apart.t())
        need_x, trains = ctx.needs_input_grad[0], any(ctx.needs_input_grad[5:])
        keep = need_x and apart is None and total.numel() <= max(x.numel(), y.numel())
        ctx.save_for_backward(
            inputs if trains else None,
            weight if need_x and not keep else None,
            total if keep else None,
            *parameters,
        )
        ctx.settings = (change, dtype, x.shape, x.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        inputs, weight, total, *parameters = ctx.saved_tensors
        change, dtype, shape, x_dtype = ctx.settings
        g = grad.reshape(-1, grad.shape[-1]).to(dtype)
        grad_x, grads = None, (None,) * len(parameters)
        with exact_dtypes(g.device.type):
            if ctx.needs_input_grad[0]:
                apart = None
                if total is None:
                    total, apart = _total(weight, change, parameters, dtype)
                grad_x = g.mm(total)
                if apart is not None:
                    grad_x.addmm_(g, apart)
                grad_x = grad_x.view(shape).to(x_dtype)
            if inputs is not None:
                G = g.t().mm(inputs.reshape(-1, shape[-1])).to(parameters[0].dtype)
                found = change.pull(G, *parameters)
                grads = tuple(f.to(p.dtype) for f, p in zip(found, parameters, strict=True))
        return grad_x, None, None, None, None, *grads
