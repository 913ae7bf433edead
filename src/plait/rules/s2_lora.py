"""S2-LoRA: one trained pair of factors for all layers of a shape; a layer owns r coefficients.

    x ──► A (r x in) ──► * c_i ──► B (out x r) ──► * scaling ──► + W_i x     A, B of all such layers

dW_i = scaling * B diag(c_i) A. Each c_i is pulled towards zero, so that a layer ends up using the
few components it needs: the rank of every layer is learned. Rule `s2-lora` does that with a soft
threshold after each step, c <- sign(c) max(|c| - eta l1, 0), eta being lr (under Adam lr / sqrt(v)
of each entry): as a term of the loss the penalty would never give an exact zero. And it holds A A^T
and B^T B near I, without which a growing pair would undo the penalty. In a loop without rules
nothing is sparse. Start: A's rows and B's columns orthonormal, c = 0, which is the base model (only
c has a gradient in the first step). Weight matrices of another shape have another pair. The paper's
constants are not public: `l1` and `orthogonal` are ours, and to be tried.
Paper: Liu et al., 2023, arXiv 2309.11756. Parameters: r a site, and r (in + out) a shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.adapter import Method, Rule, Run
from plait.errors import PlaitError
from plait.rules._shared_pair import S2LoraDelta, S2LoraOptions, s2_count
from plait.rules._steps import step_sizes


@dataclass
class S2Lora(Rule):
    l1: float = 1e-3
    """Weight of sum |c| beside the task's loss: a coefficient that lowers it by less a unit goes
    to zero; 0 leaves c alone."""
    orthogonal: float = 0.1
    """Weight of the mean over pairs of ||A A^T - I||^2 + ||B^T B - I||^2."""

    def check(self, run: Run) -> None:
        super().check(run)
        if self.l1 < 0 or self.orthogonal < 0:
            raise PlaitError("rule S2Lora: l1 and orthogonal must be at least 0.")
        if not run.deltas(S2LoraDelta):
            raise PlaitError("rule S2Lora shrinks the coefficients of method s2-lora; attach that.")

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._deltas = run.deltas(S2LoraDelta)

    def ranks(self) -> dict[str, int]:
        """Components in use, by "adapter/site path"."""
        return {name: delta.effective_rank for name, delta in self._deltas.items()}

    def extra_loss(self) -> Tensor | None:
        if not self.orthogonal:
            return None
        pairs = {id(d.pair()[0]): d.pair() for d in self._deltas.values()}
        terms = [_distance(A) + _distance(B.mT) for A, B in pairs.values()]
        return self.orthogonal * torch.stack(terms).mean()

    @torch.no_grad()
    def after_step(self) -> None:
        every: list[Any] = [d.c for d in self._deltas.values()] if self.l1 else []
        for c, step in zip(every, step_sizes(self.run.optimizer, every), strict=True):
            c.copy_(c.sign() * (c.abs() - step * self.l1).clamp_min(0.0))


def _distance(rows: Tensor) -> Tensor:
    gram = rows @ rows.mT
    return (gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).square().sum()


METHOD = Method(
    name="s2-lora",
    title="S2-LoRA: sparsely shared LoRA",
    paper="Liu et al., 2023, arXiv 2309.11756",
    axis="parameterisation",
    options=S2LoraOptions,
    delta=S2LoraDelta,
    rule=S2Lora,
    count=s2_count,
    example={"rank": 4},
)
