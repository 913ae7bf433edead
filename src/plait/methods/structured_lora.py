"""StructuredLoRA (SLoRA): a small trained matrix between LoRA's two.

    x ──► A (r x in) ──► R (r x r) ──► B (out x r) ──► * s ──► + W x

dW = s B R A, all three trained. A and R (the paper's N) start at Kaiming's uniform distribution and
B at zero, so that training starts at the base model and only B has a gradient in the first step
(with R at zero as well nothing would ever move). s = 1. R rides on B's side of the fused product,
r^2 out more multiplications a step and nothing per token. dW has rank r, so it exports exactly.
With rows and columns of W as its start it is `nlora`; with R alone trained, `int-tune`.
Paper: Guo et al., 2025, arXiv 2502.14482. Parameters: r (in + out) + r^2 a site.
"""

from __future__ import annotations

from dataclasses import dataclass

from plait.adapter import Method, PairDelta, PairOptions, Site, Traits, per_site
from plait.adapter.pair import Pair
from plait.errors import PlaitError
from plait.methods.lora_xs import LoraXsDelta


@dataclass(frozen=True)
class StructuredLoraOptions(PairOptions):
    rank: int = 128
    """Rank r (paper: 128)."""
    alpha: float | None = None
    """Numerator of the scaling alpha / r; None means r, a scaling of 1 as in the paper."""

    @property
    def scaling(self) -> float:
        return 1.0 if self.alpha is None else super().scaling


class StructuredLoraDelta(LoraXsDelta):
    """LoRA-XS with trained factors."""

    traits = Traits(low_rank=True)
    options: StructuredLoraOptions  # type: ignore[assignment]

    def build(self) -> None:
        PairDelta.build(self)
        self.parameter("R", self.options.rank, self.options.rank)

    def reset(self) -> None:
        PairDelta.reset(self)
        self.start("R", "kaiming_uniform")

    def pairs(self) -> list[Pair]:
        return []  # s B A is not dW: what is made for such pairs would be wrong here

    def rank_axes(self) -> dict[str, int]:
        raise PlaitError(
            f"the rank at {self.site.path!r} cannot change in training, because R has it on both "
            "sides; use lora."
        )


def structured_count(site: Site, o: PairOptions) -> int:
    """Parameters of A, R and B."""
    return o.rank * (site.in_features + site.out_features) + o.rank**2


METHOD = Method(
    name="structured-lora",
    title="StructuredLoRA: a trained matrix between A and B",
    paper="Guo et al., 2025, arXiv 2502.14482",
    axis="parameterisation",
    options=StructuredLoraOptions,
    delta=StructuredLoraDelta,
    count=per_site(structured_count),
    example={"rank": 4},
)
