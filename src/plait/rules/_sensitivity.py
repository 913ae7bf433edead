"""How much single entries of parameters matter: |w * dL/dw|, smoothed, times its deviation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class EntryScores:
    """Running scores of groups of parameters; `beta1` smooths them, `beta2` their deviation.

        I = |w g|      M <- beta1 M + (1 - beta1) I      D <- beta2 D + (1 - beta2) |I - M|

    The score of an entry is M * D: an entry matters when moving it moves the loss, and more so
    when that has not settled (Zhang et al., 2022, arXiv 2206.12562).
    """

    def __init__(self, beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self._kept: dict[str, dict[str, list[Tensor]]] = {}

    @torch.no_grad()
    def observe(self, group: str, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take in this step's gradients; parameters without one are left as they were."""
        kept = self._kept.setdefault(group, {})
        for name, p in parameters.items():
            if p.grad is None:
                continue
            impact = (p * p.grad).abs()
            mean, deviation = (t.to(p.device) for t in kept.get(name) or _zeros(impact))
            mean.lerp_(impact, 1 - self.beta1)
            deviation.lerp_((impact - mean).abs_(), 1 - self.beta2)
            kept[name] = [mean, deviation]

    def along(self, group: str, axes: Mapping[str, int]) -> Tensor | None:
        """Scores along an axis of each parameter, averaged over its others, then summed.

        For triplets: score(e_k) + mean_j score(A_kj) + mean_i score(B_ik). None before the first
        gradient.
        """
        kept = self._kept.get(group)
        if not kept:
            return None
        found = []
        for name, (mean, deviation) in kept.items():
            score = (mean * deviation).movedim(axes[name], 0)
            found.append(score.flatten(1).mean(1) if score.dim() > 1 else score)
        return torch.stack(found).sum(0)

    def keep(self, group: str, index: Tensor, axes: Mapping[str, int]) -> None:
        """Follow parameters of which only the slices `index` are left."""
        for name, both in self._kept.get(group, {}).items():
            both[:] = [t.index_select(axes[name], index.to(t.device)) for t in both]

    def forget(self) -> None:
        self._kept = {}

    def state_dict(self) -> dict[str, Any]:
        return {g: {n: list(both) for n, both in kept.items()} for g, kept in self._kept.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._kept = {
            group: {name: [t.clone() for t in both] for name, both in kept.items()}
            for group, kept in state.items()
        }


def _zeros(like: Tensor) -> list[Tensor]:
    return [torch.zeros_like(like), torch.zeros_like(like)]
