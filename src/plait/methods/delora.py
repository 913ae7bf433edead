"""DeLoRA: rank-one terms of unit length, whose strength one number sets apart from their angles.

    x ──► * n (in) ──► A (r x in), rows of length 1 ──► B (out x r), columns of length 1
      ──► * lambda / r ──► + W x

dW = (lambda / r) sum_i b_i a_i^T / (|b_i| |a_i|) diag(n), n [in] the lengths of W's columns: each
of the r terms has norm at most lambda max(n) / r, so dW cannot run away whatever the learning
rate. lambda [1] trains too. Lengths below 1e-4 count as 1e-4, as in PEFT, so that B = 0 can start
at the base model (A ~ U(-1/sqrt(in), 1/sqrt(in))). n is stored with the adapter: dW then needs no
base and means the same beside a quantised one. dW rides on the fused product as a pair.
Paper: Bini et al., 2025, arXiv 2503.18225. Parameters: r (in + out) + 1 a site.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plait.adapter import Delta, Method, Options, Traits, per_site
from plait.linalg import LowRank
from plait.methods._delora_peft import PEFT
from plait.methods._ranges import check_ranges

SHORTEST = 1e-4


@dataclass(frozen=True)
class DeloraOptions(Options):
    rank: int = 8
    """Rank r of dW."""
    strength: float = 15.0
    """Start of lambda, the bound of dW's norm in units of W's column lengths (PEFT: 15)."""
    dropout: float = 0.0
    """Probability of dropping an input feature in training."""

    def __post_init__(self) -> None:
        check_ranges(self, "rank")


class DeloraDelta(Delta):
    traits = Traits(low_rank=True)
    options: DeloraOptions
    A: Tensor
    B: Tensor
    strength: Tensor
    lengths: Tensor

    def build(self) -> None:
        self.parameter("A", self.options.rank, self.site.in_features)
        self.parameter("B", self.site.out_features, self.options.rank)
        self.parameter("strength", 1)
        self.frozen("lengths", self.site.in_features)

    def reset(self) -> None:
        self.start("A", "kaiming_uniform")
        with torch.no_grad():
            self.strength.fill_(self.options.strength)
            W = self.site.weight().detach()
            wide = torch.promote_types(W.dtype, torch.float32)
            self.lengths.copy_(torch.linalg.vector_norm(W, dim=0, dtype=wide))

    def factors(self) -> LowRank:
        a = torch.linalg.vector_norm(self.A, dim=1).clamp_min(SHORTEST)
        b = torch.linalg.vector_norm(self.B, dim=0).clamp_min(SHORTEST)
        scale = self.strength / (len(self.A) * a * b)
        return LowRank(B=self.B * scale, A=self.A * self.lengths)


METHOD = Method(
    name="delora",
    title="DeLoRA: decoupled low-rank adaptation",
    paper="Bini et al., 2025, arXiv 2503.18225",
    axis="parameterisation",
    options=DeloraOptions,
    delta=DeloraDelta,
    count=per_site(lambda site, o: o.rank * (site.in_features + site.out_features) + 1),
    peft=PEFT,
)
