"""x S^T for a sparse S with trained values: one autograd node, nothing dense of S's size.

    y = x S^T        dx = g S        dS at position (j, i) = sum over tokens of g_tj x_ti

Products run in compressed rows, walking along the tokens; the gradient of the values is sampled at
their positions alone, 2 p tokens operations where g^T x would take 2 out in tokens.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from plait.kernels._gate import compute_dtype, exact_dtypes


class Layout(NamedTuple):
    """A sparsity pattern by rows and by columns, in compressed form, int32."""

    shape: tuple[int, int]
    row_ends: Tensor
    columns: Tensor
    column_ends: Tensor
    rows: Tensor
    order: Tensor
    """The entries in the order of columns."""

    def by_rows(self, values: Tensor) -> Tensor:
        """S [out, in]."""
        return _csr(self.row_ends, self.columns, values, self.shape)

    def by_columns(self, values: Tensor) -> Tensor:
        """S^T [in, out]."""
        return _csr(self.column_ends, self.rows, values[self.order], self.shape[::-1])


def make_layout(flat: Tensor, out: int, inputs: int) -> Layout:
    """The pattern of sorted positions `flat` in the flattened [out, inputs]."""
    rows, columns = flat // inputs, flat % inputs
    order = columns.argsort(stable=True)
    shape, by_column = (out, inputs), rows[order].int()
    return Layout(shape, _ends(rows, out), columns.int(), _ends(columns, inputs), by_column, order)


def sparse_linear(x: Tensor, values: Tensor, layout: Layout) -> Tensor:
    """x [..., in] times S^T, [..., out], in the dtype in which `F.linear` would multiply x."""
    return _Sparse.apply(x, values, layout, compute_dtype(x))


def has_sparse(device: torch.device) -> bool:
    """Whether torch has these products on `device`."""
    return device.type == "cuda" or (device.type == "cpu" and torch.backends.mkl.is_available())


def _ends(lines: Tensor, count: int) -> Tensor:
    ends = torch.bincount(lines, minlength=count).cumsum(0)
    return torch.cat([ends.new_zeros(1), ends]).int()


def _csr(ends: Tensor, inner: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    _silence_beta()
    return torch.sparse_csr_tensor(ends, inner, values, shape, check_invariants=False)


@cache
def _silence_beta() -> None:
    """torch says once in a process that CSR is in beta, about which a user can do nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zero = torch.zeros(2, dtype=torch.int32)
        torch.sparse_csr_tensor(zero, zero[:0], torch.zeros(0), (1, 1))


def _transposed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [..., n] as a contiguous [n, tokens]."""
    return x.reshape(-1, x.shape[-1]).t().to(dtype).contiguous()


class _Sparse(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
        # Half precision has no sparse product on a CPU.
        ctx.work = torch.promote_types(torch.promote_types(x.dtype, values.dtype), torch.float32)
        ctx.layout, ctx.x_dtype, ctx.x_shape = layout, x.dtype, x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values)
        with exact_dtypes(x.device.type):
            y = layout.by_rows(values.to(ctx.work)) @ _transposed(x, ctx.work)
        return y.t().to(dtype).reshape(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, values = ctx.saved_tensors
        layout: Layout = ctx.layout
        grad_x = grad_values = None
        with exact_dtypes(grad.device.type):
            g, work = _transposed(grad, ctx.work), values.to(ctx.work)
            if ctx.needs_input_grad[0]:
                grad_x = (layout.by_columns(work) @ g).t().to(ctx.x_dtype).reshape(ctx.x_shape)
            if ctx.needs_input_grad[1]:
                rows = x.reshape(-1, x.shape[-1]).to(ctx.work)
                sampled = torch.sparse.sampled_addmm(layout.by_rows(work), g, rows, beta=0.0)
                grad_values = sampled.values().to(values.dtype)
        return grad_x, grad_values, None, None
