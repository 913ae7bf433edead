"""A perturbation of trained tensors along the optimiser's first moment (MGPO).

    eps = rho / gbar * m / ||m||        m over all tensors, gbar: smoothed norm of the gradient

The copy that puts the weights back is as large as the adapter, and lives from a step's first
forward to its update.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn

from plait.adapter import Run
from plait.linalg.precision import working_dtype

MOMENTS = ("exp_avg", "momentum_buffer")
"""Where torch's optimisers, and most others, keep a first moment of a parameter's shape."""


class MomentumStep:
    """The perturbation of a run's adapters; `observe` after every step, `on` and `off` between."""

    def __init__(self, run: Run, rho: float, beta: float, mu: float, limit: float | None) -> None:
        self.run, self.rho, self.beta, self.mu, self.limit = run, rho, beta, mu, limit
        self.norm: Tensor | None = None
        """gbar; None before the first step."""
        self.own: dict[str, Tensor] = {}
        """First moments of what the optimiser keeps none for."""
        self._kept: list[tuple[nn.Parameter, Tensor]] = []

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        for adapter in self.run.adapters:
            for name, p in adapter.named_parameters():
                if p.requires_grad:
                    yield f"{adapter.name}/{name}", p

    @torch.no_grad()
    def observe(self) -> None:
        """Take in the gradients of the step that was made; moments are the optimiser's by now."""
        trained = [(name, p, p.grad) for name, p in self._trained() if p.grad is not None]
        if not trained:
            return
        found = total_norm([g for _, _, g in trained])
        old = found if self.norm is None else self.norm.to(found)
        # One overflow in half precision must not end perturbation for good.
        old = torch.where(old.isfinite(), old, found)
        smooth = old.lerp(found, 1 - self.beta)
        self.norm = torch.where(smooth.isfinite(), smooth, old)
        for name, p, g in trained:
            if self._theirs(p) is None:
                wide = g.to(working_dtype(p.dtype))
                kept = self.own.get(name)
                start = kept.to(wide) if _fits(kept, p) else torch.zeros_like(wide)
                self.own[name] = start.lerp(wide, 1 - self.mu)

    def _theirs(self, p: nn.Parameter) -> Tensor | None:
        assert self.run.optimizer is not None
        state = self.run.optimizer.state.get(p, {})
        return next((state[key] for key in MOMENTS if _fits(state.get(key), p)), None)

    def moments(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The tensors that have a first moment, with it."""
        found = []
        for name, p in self._trained():
            moment = self._theirs(p)
            moment = self.own.get(name) if moment is None else moment
            if moment is not None and _fits(moment, p):
                found.append((p, moment))
        return found

    @torch.no_grad()
    def on(self) -> None:
        """Move every tensor by its part of eps; nothing before the first step."""
        found = self.moments() if self.norm is not None and self.rho else []
        if not found:
            return
        assert self.norm is not None
        length = total_norm([m for _, m in found])
        size = self.rho / self.norm.to(length)
        if self.limit is not None:
            size = size.minimum(self.limit * total_norm([p for p, _ in found]))
        scale = size / length
        scale = torch.where(scale.isfinite(), scale, 0.0)
        self._kept = [(p, p.detach().clone()) for p, _ in found]
        for p, moment in found:
            wide = working_dtype(p.dtype)
            moved = p.to(wide) + scale.to(p.device, wide) * moment.to(p.device, wide)
            # Through .data: an evaluation between a forward and its backward puts the weights back
            # and perturbs them again, to the same bits, which autograd need not know of.
            p.data.copy_(moved)

    @torch.no_grad()
    def off(self) -> None:
        """Put back what was there, bit for bit."""
        for p, value in self._kept:
            p.data.copy_(value)
        self._kept = []


def _fits(moment: object, p: nn.Parameter) -> TypeGuard[Tensor]:
    """Is it a plain moment of that parameter (and not a quantised one, or of an older rank)?"""
    return isinstance(moment, Tensor) and moment.shape == p.shape and moment.is_floating_point()


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm over all tensors together, a scalar on the first one's device."""
    first = tensors[0]
    wide = working_dtype(first.dtype)
    norms = [torch.linalg.vector_norm(t.detach(), dtype=working_dtype(t.dtype)) for t in tensors]
    return torch.linalg.vector_norm(torch.stack([n.to(first.device, wide) for n in norms]))
