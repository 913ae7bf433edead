"""Comp-LoRA: a LoRA that leaves W's leading singular directions alone.

    x ──► (I - V_k V_k^T) ──► A (r x in) ──► B (out x r) ──► (I - U_k U_k^T) ──► * scaling ──► + W x

dW = scaling * P_u B A P_v, where U_k and V_k are W's k leading singular vectors: W's k largest
singular triplets stay singular triplets of W + dW, whatever is learned. The projectors act on the
small factors, never on activations, so dW is an exact low-rank pair: fusing, export and switching
are LoRA's, and only A, B are stored. The vectors are found (in float64, by W's Gram matrix) when
the adapter is attached; the shorter side keeps the protected basis or its complement, whichever is
smaller.
A starts as LoRA's, B at 0. The paper leaves open which side is protected and how much of it:
`side`, `energy` and `protect` say so here. After fusing, another Comp-LoRA protects the new W.
Paper: Wang et al., 2025, arXiv 2501.15040. Parameters: r (in + out) a site; in memory as many
frozen numbers as the protected directions have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from plait.adapter import Method, Pair, PairDelta, PairOptions, Site, Traits, per_site
from plait.adapter.choices import check_choices
from plait.errors import PlaitError
from plait.linalg import LowRank, gram_directions, mapped_directions


@dataclass(frozen=True)
class CompLoraOptions(PairOptions):
    rank: int = 4
    """Rank r of dW (paper: 2 to 4)."""
    side: Literal["both", "output", "input"] = "both"
    """Keep dW off U_k (output), off V_k (input), or off both."""
    energy: float = 0.9
    """Protect as few directions as carry this share of W's squared singular values."""
    protect: int | None = None
    """How many directions k to protect, instead of `energy`; 0 is plain LoRA."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, "comp-lora")
        if not 0 < self.energy < 1:
            raise PlaitError(f"comp-lora: energy must lie between 0 and 1, not {self.energy}.")

    def protected(self, S: Tensor, path: str) -> int:
        """k for the singular values S [q], descending; at least one direction stays free."""
        most = max(len(S) - 1, 0)
        if self.protect is None:
            share = S.square().cumsum(0)
            return min(int((share < self.energy * share[-1]).sum()) + bool(share[-1]), most)
        if not 0 <= self.protect <= most:
            raise PlaitError(
                f"comp-lora: protect={self.protect} at {path!r} leaves dW nothing of {len(S)} "
                f"directions; choose 0 to {most}."
            )
        return self.protect


class CompLoraDelta(PairDelta):
    kinds = frozenset({"linear", "conv"})
    traits = Traits(low_rank=True, depends_on_base=True)
    options: CompLoraOptions

    def attached(self) -> None:
        W = self.site.weight().detach().double()
        rows, S, flat = gram_directions(W)
        k = self.options.protected(S, self.site.path)
        # All vectors of the shorter side are known: the rest of them may be the fewer.
        short, long = ("output", "input") if flat else ("input", "output")
        self.complement = {short: 2 * k > len(S), long: False}
        bases = {
            short: rows[k:] if self.complement[short] else rows[:k],
            long: mapped_directions(W, rows[:k], flat),
        }
        for name, basis in bases.items():
            self.seeded_value(name, basis.to(self.dtype).contiguous())

    def seeded_tensors(self) -> dict[str, Tensor]:
        return {}  # derived from W, so their last bits are no promise of the seed

    def project(self, rows: Tensor, side: str) -> Tensor:
        """The rows [r, n] without their part in the protected space of that side."""
        if side not in self._buffers:
            self.attached()  # raises where there is no base, naming the site
        if self.options.side not in ("both", side):
            return rows
        basis = self.get_buffer(side)
        part = (rows @ basis.mT) @ basis
        return part if self.complement[side] else rows - part

    def trained(self) -> LowRank:
        A, B = self.project(self.A, "input"), self.project(self.B.mT, "output").mT
        return LowRank(B=B, A=A, scale=self.scaling)

    def hold_back(self) -> None:
        low = self.trained()
        self.register_buffer("held_A", low.A.detach().clone())
        self.register_buffer("held_B", low.B.detach().clone())

    def pairs(self) -> list[Pair]:
        return []  # projected: dW is not scaling * B A, which is what rules over pairs assume


def _count(site: Site, o: CompLoraOptions) -> int:
    return o.rank * (site.in_features + site.out_features)


METHOD = Method(
    name="comp-lora",
    title="Comp-LoRA: LoRA in the complement of W's leading directions",
    paper="Wang et al., 2025, arXiv 2501.15040",
    axis="parameterisation",
    options=CompLoraOptions,
    delta=CompLoraDelta,
    count=per_site(_count),
)
