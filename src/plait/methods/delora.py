"""DeLoRA: rank-one terms of unit length, whose strength one number sets apart from their angles.

    x ──► * n (in) ──► A (r x in), rows of length 1 ──► B (out x r), columns of length 1
      ──► * lambda / r ──► + W x

dW = (lambda / r) sum_i b_i a_i^T / (|b_i| |a_i|) diag(n), n [in] the lengths of W's columns: each
of the r terms has norm at most lambda max(n) / r, so dW cannot run away whatever the learning
rate. lambda [1] trains too. As in the paper, random terms are drawn first and subtracted from
then on, so that training starts at the base model; they come back from the seed and are not saved.
`start="zero"` is PEFT's form instead: B = 0, lengths below 1e-4 counting as 1e-4, nothing to
subtract. There the first step already gives every term its full strength. n is stored with the
adapter: dW then needs no base and means the same beside a quantised one. dW rides on the fused
product as a pair, of rank 2r where something is subtracted.
Paper: Bini et al., 2025, arXiv 2503.18225. Parameters: r (in + out) + 1 a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from plait.adapter import Delta, Method, Options, Traits, per_site
from plait.adapter.choices import check_choices
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
    start: Literal["held", "zero"] = "held"
    """Random terms that are subtracted from then on (the paper), or B = 0 (PEFT's files)."""
    dropout: float = 0.0
    """Probability of dropping an input feature in training."""

    def __post_init__(self) -> None:
        check_choices(self, "delora")
        check_ranges(self, "rank")


class DeloraDelta(Delta):
    traits = Traits(low_rank=True)
    options: DeloraOptions
    A: Tensor
    B: Tensor
    strength: Tensor
    lengths: Tensor
    first_A: Tensor
    first_B: Tensor

    def build(self) -> None:
        self.parameter("A", self.options.rank, self.site.in_features)
        self.parameter("B", self.site.out_features, self.options.rank)
        self.parameter("strength", 1)
        self.frozen("lengths", self.site.in_features)
        if self.options.start == "held":
            for name, width in (("first_A", self.site.in_features), ("first_B", len(self.B))):
                self.seeded(name, "kaiming_uniform", self.options.rank, width)

    def reset(self) -> None:
        self.start("A", "kaiming_uniform")
        with torch.no_grad():
            if self.options.start == "held":
                self.A.copy_(self.first_A)
                self.B.copy_(self.first_B.mT)
            self.strength.fill_(self.options.strength)
            W = self.site.weight().detach()
            wide = torch.promote_types(W.dtype, torch.float32)
            self.lengths.copy_(torch.linalg.vector_norm(W, dim=0, dtype=wide))

    def factors(self) -> LowRank:
        A, B = self.A, _terms(self.A, self.B, self.strength)
        if self.options.start == "held":
            first = _terms(self.first_A, self.first_B.mT, self.options.strength)
            A, B = torch.cat([A, self.first_A]), torch.cat([B, -first], 1)
        return LowRank(B=B, A=A * self.lengths)


def _terms(A: Tensor, B: Tensor, strength: Tensor | float) -> Tensor:
    """B [out, r] with the whole scale of every term b a^T: (strength / r) / (|a| |b|)."""
    a = torch.linalg.vector_norm(A, dim=1).clamp_min(SHORTEST)
    b = torch.linalg.vector_norm(B, dim=0).clamp_min(SHORTEST)
    return B * (strength / (len(A) * a * b))


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
