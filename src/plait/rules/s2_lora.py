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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.adapter import Delta, Method, PairOptions, Rule, Run, SharedTensors, Site, Traits
from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.rules._steps import step_sizes


@dataclass(frozen=True)
class S2LoraOptions(PairOptions):
    rank: int = 32
    """Rank r of the shared pairs, and so the most that a layer can use (paper: 32 to 128)."""


def _shape(site: Site) -> str:
    return f"{site.out_features}x{site.in_features}"


class S2LoraDelta(Delta):
    kinds = frozenset({"linear", "conv"})
    traits = Traits(low_rank=True)
    options: S2LoraOptions
    c: Tensor

    @classmethod
    def prepare(cls, sites: Sequence[Site], options: S2LoraOptions, shared: SharedTensors) -> None:
        for site in sites:
            if f"A_{_shape(site)}" not in shared:
                shared.pool(f"A_{_shape(site)}", (options.rank, site.in_features), "orthogonal")
                shared.pool(f"B_{_shape(site)}", (site.out_features, options.rank), "orthogonal")

    def build(self) -> None:
        shared = len(self.pair()[0])
        if self.options.rank != shared:
            raise PlaitError(
                f"rank {self.options.rank} at {self.site.path!r} is not the {shared} of the pair "
                "that it shares with other layers; overrides= may not change it."
            )
        self.parameter("c", shared)

    def pair(self) -> tuple[Tensor, Tensor]:
        """The shared A [r, in] and B [out, r]."""
        return self.shared[f"A_{_shape(self.site)}"], self.shared[f"B_{_shape(self.site)}"]

    @property
    def effective_rank(self) -> int:
        """How many components this layer uses."""
        return int(self.c.count_nonzero())

    def factors(self) -> LowRank:
        A, B = self.pair()
        return LowRank(B=B * self.c, A=A, scale=self.options.scaling)


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
        if not _deltas(run):
            raise PlaitError("rule S2Lora shrinks the coefficients of method s2-lora; attach that.")

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._deltas = _deltas(run)

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


def _deltas(run: Run) -> dict[str, S2LoraDelta]:
    named = ((f"{a.name}/{path}", d) for a in run.adapters for path, d in a.deltas.items())
    return {name: delta for name, delta in named if isinstance(delta, S2LoraDelta)}


def _count(sites: Sequence[Site], o: S2LoraOptions) -> int:
    pairs = {_shape(s): s.in_features + s.out_features for s in sites}
    return o.rank * (sum(pairs.values()) + len(sites))


METHOD = Method(
    name="s2-lora",
    title="S2-LoRA: sparsely shared LoRA",
    paper="Liu et al., 2023, arXiv 2309.11756",
    axis="parameterisation",
    options=S2LoraOptions,
    delta=S2LoraDelta,
    rule=S2Lora,
    count=_count,
    example={"rank": 4},
)
