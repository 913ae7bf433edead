"""Products of a random basis, mixed by two sets of diagonals, of which nothing is kept a site.

    M[k N + j] = lam[k, j] A[k] * gamma[j]     M [r N, m] from A [r, m], lam [r, N], gamma [N, m]
    P = B M                                    B [D, r N]

`tall`: y = x M^T B^T (m inputs, D outputs); otherwise y = x B M. M has as many entries as W, so it
is made again in backward; there x is kept in the first form and x B, the smaller, in the second.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from plait.kernels._gate import compute_dtype, exact_dtypes, plain_path


def mix(A: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
    """M [r N, m]."""
    return ((lam[:, :, None] * A[:, None]) * gamma).flatten(0, 1)


def pull_mix(G: Tensor, A: Tensor, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of lam and gamma, given that of M."""
    seen = G.view(*lam.shape, -1) * A[:, None]
    return (seen * gamma).sum(-1), (seen * lam[:, :, None]).sum(0)


def mixed_linear(
    x: Tensor, A: Tensor, B: Tensor, lam: Tensor, gamma: Tensor, scale: float, tall: bool
) -> Tensor:
    """scale * x P^T (`tall`) or scale * x P, without forming P: 2 r N (m + D) a token."""
    if plain_path(x, A, B, lam, gamma):
        dtype = compute_dtype(x)
        M, Bt = (mix(A, lam, gamma) * scale).to(dtype), B.to(dtype)
        return x @ M.t() @ Bt.t() if tall else x @ Bt @ M
    return _Mixed.apply(x, lam, gamma, (A, B, scale, tall, compute_dtype(x)))


class _Mixed(Function):
    @staticmethod
    def forward(ctx: Any, x, lam, gamma, settings):
        A, B, scale, tall, dtype = settings
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        with exact_dtypes(x.device.type):
            M, Bt = mix(A, lam, gamma).to(dtype).mul_(scale), B.to(dtype)
            u = flat.mm(M.t()) if tall else flat.mm(Bt)
            y = u.mm(Bt.t()) if tall else u.mm(M)
        ctx.save_for_backward(flat if tall else u, lam, gamma)
        ctx.settings = (settings, x.shape, x.dtype)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        kept, lam, gamma = ctx.saved_tensors
        (A, B, scale, tall, dtype), shape, x_dtype = ctx.settings
        g = grad.reshape(-1, grad.shape[-1]).to(dtype)
        need_x, *need = ctx.needs_input_grad[:3]
        grad_x = grad_lam = grad_gamma = None
        with exact_dtypes(g.device.type):
            Bt = B.to(dtype)
            du = g.mm(Bt) if tall else g
            if need_x:
                M = mix(A, lam, gamma).to(dtype).mul_(scale)
                grad_x = du.mm(M) if tall else du.mm(M.t()).mm(Bt.t())
                grad_x = grad_x.view(shape).to(x_dtype)
            if any(need):
                G = (du.t().mm(kept) if tall else kept.t().mm(du)).to(lam.dtype).mul_(scale)
                grad_lam, grad_gamma = pull_mix(G, A.to(lam.dtype), lam, gamma)
        return grad_x, grad_lam, grad_gamma, None
