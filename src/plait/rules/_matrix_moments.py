"""An Adam whose second moment is a matrix, in coordinates that turn from step to step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Side:
    """One factor of a batch of pairs, taken as a tall matrix X [n, rows, r], with the other one's
    decomposition U T. (Packed experts have an axis more behind the first.)
    """

    keys: list[str]
    parameters: list[nn.Parameter]
    gradient: Tensor
    """In coordinates of U, [n, rows, r]."""
    basis: Tensor
    """U [n, other rows, r], orthonormal columns."""
    inverse: Tensor
    """T^-1 [n, r, r]."""

    def write(self, direction: Tensor, flat: bool) -> None:
        """Make [n, rows, r] the parameters' gradients; `flat` where these are [r, rows]."""
        for p, d in zip(self.parameters, direction.mT if flat else direction, strict=True):
            p.grad = d.to(p.dtype).contiguous()


@dataclass
class MatrixMoments:
    """M [rows, r] and V [r, r] of every key, kept beside the basis that they are read in.

    Decays start at 0, so that no mean is biased towards 0. `escape` adds to V what its turns have
    lost: the lesser of the greatest loss of an eigenvalue and the loss of trace, decaying as V.
    """

    betas: tuple[float, float]
    eps: float
    escape: bool = False
    kept: dict[str, dict[str, Any]] = field(default_factory=dict)

    def direction(self, side: Side, gradient: Tensor) -> Tensor:
        """M after this gradient, in the side's coordinates."""
        first, second, escaped = self._turned(side, gradient)
        counts = [self.kept.get(key, {}).get("count", 0) + 1 for key in side.keys]
        b1, b2 = (corrected_decay(beta, counts, gradient) for beta in self.betas)
        second = b2 * second + (1 - b2) * (gradient.mT @ gradient) / gradient.shape[-2]
        escaped = b2 * escaped
        values, vectors = torch.linalg.eigh((second + second.mT) / 2)
        root = (values.unsqueeze(-2).clamp_min(0) + escaped).sqrt() + self.eps
        first = b1 * first + (1 - b1) * (gradient @ vectors / root @ vectors.mT)
        new = {"basis": side.basis, "first": first, "second": second, "escaped": escaped}
        for i, (key, count) in enumerate(zip(side.keys, counts, strict=True)):
            self.kept[key] = {"count": count, **{k: t[i].clone() for k, t in new.items()}}
        return first

    def _turned(self, side: Side, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """M, V and the escaped mass so far, in the coordinates of the side's basis."""
        zero, (*lead, _, r) = gradient.new_zeros, gradient.shape[1:]
        start = {"basis": zero(side.basis.shape[1:]), "first": zero(gradient.shape[1:])}
        start |= {"second": zero(*lead, r, r), "escaped": zero(*lead, 1, 1)}
        kept = [self.kept.get(key, start) for key in side.keys]
        old = {k: torch.stack([one[k].to(gradient) for one in kept]) for k in start}
        turn = side.basis.mT @ old["basis"]
        second, escaped = turn @ old["second"] @ turn.mT, old["escaped"]
        if self.escape:
            before, after = (torch.linalg.eigvalsh(V) for V in (old["second"], second))
            lost = torch.minimum((before - after).amax(-1), (before - after).sum(-1))
            escaped = escaped + lost.clamp_min(0)[..., None, None]
        return old["first"] @ turn.mT, second, escaped


def corrected_decay(beta: float, counts: list[int], like: Tensor) -> Tensor:
    """0 at the first step and beta in the end: a mean that is never biased towards 0."""
    found = [beta * (1 - beta ** (t - 1)) / (1 - beta**t) for t in counts]
    made = torch.tensor(found, dtype=like.dtype, device=like.device)
    return made.reshape(-1, *[1] * (like.dim() - 1))
