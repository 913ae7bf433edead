"""Noise on weights, row by row, drawn again in backward instead of kept (GGPO).

    y + x E^T        E [out, in], row i from N(0, sigma_i^2)        dx + dy E

Drawn on the device that computes, from a seed for the step and the site, in blocks of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.adapter import Pair, Run, first_input
from plait.adapter.seeds import generator
from plait.rules._row_norms import change_norms, gradient_norms

_BLOCK = 2**22  # numbers of E that exist at a time
_SAMPLE = 1000  # rows of W that its mean row norm is taken over


class RowNoise:
    """Noise on the linear sites of a run's pairs, the same within a step."""

    def __init__(self, run: Run, sigma: float, kappa: float) -> None:
        self.run, self.sigma, self.kappa = run, sigma, kappa
        named = ((f"{a.name}/{p.path}", p) for a in run.adapters for p in a.pairs())
        self.pairs = {name: pair for name, pair in named if pair.delta.site.kind == "linear"}
        self.base = {name: mean_row_norm(p.delta.site.weight()) for name, p in self.pairs.items()}
        self.gradients: dict[str, Tensor] = {}
        """{name: row norms [out] of the last gradient of dW}; none before the first step."""
        self.deviations: dict[str, Tensor] = {}
        self.active = False
        self._handles = []
        for name, pair in self.pairs.items():
            module = pair.delta.site.base
            hook = partial(self._add, name)
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def on(self) -> None:
        self.active = True

    def off(self) -> None:
        self.active = False

    @torch.no_grad()
    def observe(self) -> None:
        """Take in the gradients of the coming step, at the weights that they belong to."""
        self.gradients = {n: gradient_norms(p) for n, p in self.pairs.items() if _trains(p)}

    @torch.no_grad()
    def update(self) -> None:
        """Standard deviations of rows, from the weights as they are now."""
        for name, norms in self.gradients.items():
            pair = self.pairs[name]
            weights = torch.hypot(change_norms(pair), self.base[name])
            total = self.sigma * weights + self.kappa * norms.to(weights).square()
            self.deviations[name] = total / pair.delta.site.out_features**0.5

    def seed(self, name: str) -> int:
        """Of this step's draw at one site: a function of the run's seed, with nothing to keep."""
        own = generator(self.run.seed, "lora-ggpo", str(self.run.step), name)
        return own.initial_seed()

    def _add(self, name: str, module: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        deviations = self.deviations.get(name)
        if not self.active or deviations is None:
            return None
        noise = _Noise.apply(first_input(args, kwargs), deviations, self.seed(name))
        return output + noise.to(output.dtype)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


class _Noise(torch.autograd.Function):
    """x E^T, where backward draws E again; sigma gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, deviations: Tensor, seed: int) -> Tensor:
        ctx.seed, ctx.dtype, ctx.width = seed, x.dtype, x.shape[-1]
        ctx.save_for_backward(deviations)
        return torch.cat([F.linear(x, E) for _, E in drawn(deviations, x, seed)], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (g,), (deviations,) = grads, ctx.saved_tensors
        like = g.new_empty(0, ctx.width, dtype=ctx.dtype)
        total = None
        for rows, E in drawn(deviations, like, ctx.seed):
            part = g[..., rows].to(E.dtype) @ E
            total = part if total is None else total.add_(part)
        return total, None, None  # type: ignore[return-value]


def drawn(deviations: Tensor, like: Tensor, seed: int) -> Iterator[tuple[slice, Tensor]]:
    """E in blocks of rows, in the dtype and on the device of `like` [..., in]."""
    g = torch.Generator(like.device).manual_seed(seed)
    width = like.shape[-1]
    step = max(1, _BLOCK // max(width, 1))
    for start in range(0, len(deviations), step):
        rows = slice(start, min(start + step, len(deviations)))
        E = torch.randn(rows.stop - start, width, generator=g, dtype=like.dtype, device=like.device)
        yield rows, E.mul_(deviations[rows, None].to(E))


def mean_row_norm(W: Tensor) -> Tensor:
    """The mean norm of at most 1000 rows of W [out, in], evenly spaced."""
    rows = torch.linspace(0, len(W) - 1, min(len(W), _SAMPLE)).round().long()
    return W.detach()[rows.to(W.device)].float().norm(dim=-1).mean()


def _trains(pair: Pair) -> bool:
    return pair.A.grad is not None or pair.B.grad is not None
