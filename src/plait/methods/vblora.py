"""VB-LoRA: every piece of A and B is a mix of a few vectors from one bank for the whole model.

    bank [h, b] ──top-k logits, softmax──► piece [b] ──laid side by side──► A [r, in], B [out, r]
    dW = B A

A row of A is cut into in / b pieces and a column of B into out / b; each piece has h logits, takes
its k largest, and mixes those k bank vectors by the softmax of these logits. Gradients reach the
chosen logits and vectors, and a choice changes when an unchosen vector's logit comes to be larger.
The bank starts at U(-0.02, 0.02) and the logits at N(0, 0.01), so dW starts small but not at zero.
Logits are needed for training only: PEFT's short form keeps the k weights and indices of a piece,
which is read too (and is then as good as settled). b must divide both sides of every site.
Paper: Li, Han, Ji, 2024, arXiv 2405.15179. Parameters: h b, and r h (in + out) / b a site.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from plait.adapter import Delta, Method, Options, SharedTensors, Site, Traits
from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.methods._ranges import check_ranges
from plait.methods._vblora_peft import PEFT


@dataclass(frozen=True)
class VbloraOptions(Options):
    rank: int = 4
    """Rank r of dW (paper: 4)."""
    vectors: int = 256
    """Vectors h in the bank (paper: 30 to 2048, growing with the model); the same at all sites."""
    length: int | None = None
    """Length b of a vector, a divisor of both sides of every site; None takes the largest up to 256
    (the paper's)."""
    chosen: int = 2
    """Bank vectors k that a piece mixes (paper: 2)."""
    bound: float = 0.02
    """The bank starts at U(-bound, bound)."""
    deviation: float = 0.1
    """Standard deviation of the logits at the start."""
    dropout: float = 0.0
    """Probability of dropping an input feature in training."""

    def __post_init__(self) -> None:
        check_ranges(self, "rank", "length")
        if not 1 <= self.chosen <= self.vectors:
            raise PlaitError(f"chosen must lie between 1 and vectors, not {self.chosen}.")

    def width(self, sites: Sequence[Site]) -> int:
        """b for these sites."""
        if self.length is not None:
            return self.length
        common = math.gcd(*(side for s in sites for side in s.shape))
        return max(b for b in range(1, 257) if common % b == 0)


class VbloraDelta(Delta):
    kinds = frozenset({"linear", "conv"})
    traits = Traits(low_rank=True, zero_start=False)
    options: VbloraOptions
    logits_A: Tensor
    logits_B: Tensor

    @classmethod
    def prepare(cls, sites: Sequence[Site], options: VbloraOptions, shared: SharedTensors) -> None:
        shared.pool("bank", (options.vectors, options.width(sites)), start="uniform")
        with torch.no_grad():
            shared["bank"].mul_(options.bound)

    def build(self) -> None:
        o, (rows, columns) = self.options, self.site.shape
        vectors, b = self.shared["bank"].shape
        if o.vectors != vectors or o.length not in (None, b):
            raise PlaitError(
                f"overrides at {self.site.path!r} may not change vectors or length, because the "
                "bank is shared with all sites."
            )
        if rows % b or columns % b:
            raise PlaitError(
                f"length={b} does not divide both sides of {self.site.path!r} "
                f"({rows} x {columns}); choose a common divisor of all sites' sides."
            )
        self.parameter("logits_A", o.rank, columns // b, o.vectors)
        self.parameter("logits_B", rows // b, o.rank, o.vectors)

    def reset(self) -> None:
        with torch.no_grad():
            for name in ("logits_A", "logits_B"):
                self.start(name, "normal")
                self.get_parameter(name).mul_(self.options.deviation)

    def _pieces(self, logits: Tensor) -> Tensor:
        """[..., b] from logits [..., h]."""
        top, index = logits.topk(self.options.chosen, dim=-1)
        weights = top.softmax(-1).unsqueeze(-2)
        return (weights @ F.embedding(index, self.shared["bank"])).squeeze(-2)

    def factors(self) -> LowRank:
        A = self._pieces(self.logits_A).flatten(1)
        B = self._pieces(self.logits_B).transpose(1, 2).flatten(0, 1)
        return LowRank(B=B, A=A)


def _count(sites: Sequence[Site], o: VbloraOptions) -> int:
    b = o.width(sites)
    pieces = sum((s.in_features + s.out_features) // b for s in sites)
    return o.vectors * (b + o.rank * pieces)


METHOD = Method(
    name="vblora",
    title="VB-LoRA: extreme parameter-efficient fine-tuning with vector banks",
    paper="Li, Han, Ji, 2024, arXiv 2405.15179",
    axis="parameterisation",
    options=VbloraOptions,
    delta=VbloraDelta,
    count=_count,
    peft=PEFT,
    example={"rank": 2, "vectors": 6, "length": 2, "bound": 0.5, "deviation": 1.0},
)
