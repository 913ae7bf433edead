"""How much a site's change matters: |dW * dL/d(dW)|, smoothed, times its smoothed deviation.

dW and its gradient are formed on the steps that are watched only, by hooks on the sites; on all
others training rides the factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from plait.adapter import Delta, Site


class Importance:
    """Scores of deltas by name; `beta1` smooths the score, `beta2` its deviation."""

    def __init__(self, deltas: Mapping[str, Delta], beta1: float, beta2: float) -> None:
        self.deltas, self.beta1, self.beta2 = deltas, beta1, beta2
        self._mean: dict[str, float] = {}
        self._deviation: dict[str, float] = {}
        self._gradients: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def watch(self, wanted: bool) -> None:
        """Hook the sites when the coming step is to be scored, and unhook them otherwise."""
        if wanted == bool(self._handles):
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for name, delta in self.deltas.items() if wanted else ():
            hook = gradient_hook(delta.site, partial(self._collect, name))
            self._handles.append(delta.site.base.register_forward_hook(hook))

    def _collect(self, name: str, gradient: Tensor) -> None:
        seen = self._gradients.get(name)
        self._gradients[name] = gradient if seen is None else seen + gradient

    @torch.no_grad()
    def update(self) -> None:
        """Score the deltas whose gradients have come in since the last call."""
        while self._gradients:
            name, gradient = self._gradients.popitem()
            self._smooth(name, float(sensitivity(self.deltas[name].dense(), gradient)))

    def _smooth(self, name: str, score: float) -> None:
        mean = self._mean[name] = self.beta1 * self._mean.get(name, 0.0) + (1 - self.beta1) * score
        old = self._deviation.get(name, 0.0)
        self._deviation[name] = self.beta2 * old + (1 - self.beta2) * abs(score - mean)

    def scores(self) -> dict[str, float]:
        """Smoothed score times smoothed deviation."""
        return {name: self._mean[name] * self._deviation[name] for name in self._mean}

    def state_dict(self) -> dict[str, Any]:
        return {"mean": dict(self._mean), "deviation": dict(self._deviation)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._mean, self._deviation = dict(state["mean"]), dict(state["deviation"])


def gradient_hook(site: Site, collect: Callable[[Tensor], None]) -> Callable[..., None]:
    """A forward hook that hands dL/d(dW) [out, in] of each backward pass to `collect`."""

    def hook(module: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            x = inputs[0].detach()
            output.register_hook(lambda g: collect(weight_gradient(site, x, g)))

    return hook


def weight_gradient(site: Site, x: Tensor, g: Tensor) -> Tensor:
    """dL/dW in canonical orientation, float32 or wider, from a site's input and output gradient."""
    wide = torch.promote_types(g.dtype, torch.float32)
    if site.kind == "linear":
        return (g.flatten(0, -2).mT @ x.flatten(0, -2).to(g.dtype)).to(wide)
    with torch.enable_grad():
        weight = torch.zeros(site.shape, dtype=g.dtype, device=g.device, requires_grad=True)
        (gradient,) = torch.autograd.grad(site.apply(x.to(g.dtype), weight), weight, g)
    return gradient.to(wide)


def sensitivity(change: Tensor, gradient: Tensor) -> Tensor:
    """sum |dW * dL/d(dW)| / sqrt(out in)."""
    return (change * gradient).abs().sum() / math.sqrt(max(1, change.numel()))
