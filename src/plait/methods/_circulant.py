"""x times a grid of circulant blocks, in the frequency domain; backward keeps x and w alone.

    y_i[p] = scale * sum_j sum_s w[i, j, s] x_j[(p + s) mod b]

A correlation: Y_i = sum_j conj(W_ij) X_j, whose transpose takes W_ij, and dW_ij = conj(G_i) X_j.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from plait.kernels._gate import compute_dtype, exact_dtypes, plain_path


def circulant_linear(x: Tensor, w: Tensor, scale: float) -> Tensor:
    """[..., out] from x [..., in] and w [out / b, in / b, b], in the dtype F.linear would give."""
    dtype = compute_dtype(x)
    if plain_path(x, w):
        return _correlate(_blocks(x, w), torch.fft.rfft(w).conj() * scale, x, w.shape[-1]).to(dtype)
    return _Circulant.apply(x, w, scale, dtype)


def _blocks(x: Tensor, w: Tensor) -> Tensor:
    """The transform [b / 2 + 1, T, n] of x [..., n b], at least in float32."""
    work = torch.promote_types(x.dtype, w.dtype)
    flat = x.reshape(-1, x.shape[-1] // w.shape[-1], w.shape[-1]).to(work)
    return torch.fft.rfft(flat).permute(2, 0, 1).contiguous()  # batches are multiplied one by one


def _correlate(X: Tensor, K: Tensor, x: Tensor, b: int) -> Tensor:
    """sum_j K_ij X_j back in the time domain, [..., m b], for K [m, n, b / 2 + 1]."""
    Y = X @ K.permute(2, 1, 0).contiguous()
    return torch.fft.irfft(Y.permute(1, 2, 0).contiguous(), n=b).reshape(*x.shape[:-1], -1)


class _Circulant(Function):
    @staticmethod
    def forward(ctx: Any, x, w, scale, dtype):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w)
        ctx.settings = (scale, x.dtype)
        with exact_dtypes(x.device.type):
            K = torch.fft.rfft(w).conj() * scale
            return _correlate(_blocks(x, w), K, x, w.shape[-1]).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        x, w = ctx.saved_tensors
        scale, x_dtype = ctx.settings
        grad_x = grad_w = None
        with exact_dtypes(grad.device.type):
            G = _blocks(grad, w)
            if ctx.needs_input_grad[0]:
                K = torch.fft.rfft(w).transpose(0, 1) * scale
                grad_x = _correlate(G, K, grad, w.shape[-1]).to(x_dtype)
            if x is not None:
                found = (G.mH @ _blocks(x, w)).permute(1, 2, 0) * scale
                grad_w = torch.fft.irfft(found, n=w.shape[-1]).to(w.dtype)
        return grad_x, grad_w, None, None
