"""`PairDelta`: deltas made of a pair A [r, in], B [out, r], with dW = scaling * B A.

LoRA itself, and the part that its many kin share: scaling, dropout, a held-back start, ranks that
change during training. `hold_back` is how an initialiser that moves mass from W into the factors
(PiSSA, LoRA-GA, KaSA) leaves W alone: what is to be subtracted becomes a frozen second pair with a
minus sign in the same fused product, so that other adapters on this base keep working and
export is a plain LoRA of rank 2r against the original base.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plait.adapter.delta import Delta, Options, Traits
from plait.errors import PlaitError
from plait.linalg import LowRank


@dataclass(frozen=True)
class PairOptions(Options):
    """Options that every method with an (A, B) pair has."""

    rank: int = 8
    """Rank r of dW."""
    alpha: float | None = None
    """Numerator of the scaling alpha / r; None means 2 r, a scaling of 2."""
    rslora: bool = False
    """Scale by alpha / sqrt(r), which keeps activations level as r grows (arXiv 2312.03732)."""
    dropout: float = 0.0
    """Probability of dropping an input feature in training."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise PlaitError(f"rank must be at least 0, not {self.rank}.")
        if not 0 <= self.dropout < 1:
            raise PlaitError(f"dropout must lie in [0, 1), not {self.dropout}.")

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) with rslora; rank 0 counts as 1, so that it can grow."""
        rank = max(self.rank, 1)
        alpha = 2.0 * rank if self.alpha is None else float(self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


@dataclass
class Pair:
    """One (A, B) pair with its scale, as rules that need both gradients together get it."""

    path: str
    A: nn.Parameter
    B: nn.Parameter
    scale: float
    delta: PairDelta


class PairDelta(Delta):
    """dW = scaling * B A, minus a held-back start where an initialiser asked for one."""

    kinds = frozenset({"linear", "conv", "embedding"})
    traits = Traits(low_rank=True)
    optional = frozenset({"held_A", "held_B"})
    options: PairOptions
    A: Tensor
    B: Tensor

    def build(self) -> None:
        r = self.options.rank
        self.parameter("A", r, self.site.in_features)
        self.parameter("B", self.site.out_features, r)

    def reset(self) -> None:
        # An embedding's A is looked up like a table: there B is random and A zero, as in PEFT.
        if self.site.kind == "embedding":
            self.start("B", "normal")
        else:
            self.start("A", "kaiming_uniform")

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    @property
    def scaling(self) -> float:
        return self.options.scaling

    def trained(self) -> LowRank:
        """scaling * B A alone, without what is held back."""
        return LowRank(B=self.B, A=self.A, scale=self.scaling)

    def factors(self) -> LowRank:
        low = self.trained()
        if "held_A" not in self._buffers:
            return low
        A = torch.cat([low.A, self.get_buffer("held_A")], dim=-2)
        B = torch.cat([low.B, -self.get_buffer("held_B")], dim=-1)
        return LowRank(B=B, A=A, scale=low.scale)

    def pairs(self) -> list[Pair]:
        A, B = self._parameters.get("A"), self._parameters.get("B")
        if A is None or B is None:
            return []
        return [Pair(self.site.path, A, B, self.scaling, self)]

    # -- starts ---------------------------------------------------------------------------------

    def set_pair(self, A: Tensor, B: Tensor) -> None:
        """Write the factors; their shapes must be the delta's own."""
        if A.shape != self.A.shape or B.shape != self.B.shape:
            raise PlaitError(
                f"start for {self.site.path!r} has A {list(A.shape)} and B {list(B.shape)}, "
                f"but the delta has A {list(self.A.shape)} and B {list(self.B.shape)}."
            )
        with torch.no_grad():
            self.A.copy_(A)
            self.B.copy_(B)

    def hold_back(self) -> None:
        """Subtract the present value of dW from now on, so that training starts at the base
        model."""
        self.register_buffer("held_A", self.A.detach().clone())
        self.register_buffer("held_B", self.B.detach().clone())

    def allocate_held(self, rank: int) -> None:
        """Room for a held-back pair that a file is about to fill."""
        self.frozen("held_A", rank, self.site.in_features)
        self.frozen("held_B", self.site.out_features, rank)

    # -- ranks that change ----------------------------------------------------------------------

    def keep(self, components: Sequence[int] | Tensor, optimizer: Any = None) -> None:
        """Keep only these rank components, and their optimiser state."""
        index = torch.as_tensor(components, dtype=torch.long, device=self.A.device)
        self._resize(index, 0, optimizer)

    def grow(self, extra: int, optimizer: Any = None) -> None:
        """Append `extra` components: A drawn anew, B zero, so that dW does not move."""
        index = torch.arange(self.rank, device=self.A.device)
        self._resize(index, extra, optimizer)

    def _resize(self, index: Tensor, extra: int, optimizer: Any) -> None:
        from plait.adapter.resize import replace_parameter

        rank = len(index) + extra
        for name, axis in self.rank_axes().items():
            new = self._fresh_components(name, axis, extra)
            replace_parameter(self, name, index, axis, new, optimizer)
        # alpha follows the rank so that the scaling, and with it dW, stays what it was.
        root = math.sqrt(max(rank, 1)) if self.options.rslora else max(rank, 1)
        self.options = dataclasses.replace(self.options, rank=rank, alpha=self.scaling * root)

    def rank_axes(self) -> dict[str, int]:
        """Which axis of which parameter counts the rank components (packed experts come first)."""
        return {"A": -2, "B": -1}

    def _fresh_components(self, name: str, axis: int, extra: int) -> Tensor:
        old = self.get_parameter(name)
        shape = list(old.shape)
        shape[axis] = extra
        if name != "A" or extra == 0:
            return old.new_zeros(shape)
        g = self.generator("grow", str(self.rank))
        bound = 1 / math.sqrt(max(self.site.in_features, 1))
        return torch.empty(shape).uniform_(-bound, bound, generator=g).to(old)

    def described_options(self) -> dict[str, Any]:
        described = super().described_options()
        described["rank"] = self.rank
        return described
