"""LoRA: a trainable low-rank change beside a frozen weight.

    x ──► A (r x in) ──► B (out x r) ──► * scaling ──► + W x

dW = scaling * B A, with A ~ U(-1/sqrt(in), 1/sqrt(in)) and B = 0, so that training starts at the
base model. scaling = alpha / r, or alpha / sqrt(r) with `rslora` (arXiv 2312.03732). On an
embedding A is the table and B the projection (A = 0, B ~ N(0, 1)); on a convolution A is a k x k
convolution to r channels and B a 1 x 1 one; on packed experts [E, out, in] each expert has its own
pair. Paper: Hu et al., 2021, arXiv 2106.09685. Parameters: r (in + out) a site.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from plait.adapter import Method, PairDelta, PairOptions, Site, Traits, per_site
from plait.adapter.formats.peft_codec import pair_codec
from plait.linalg import LowRank


@dataclass(frozen=True)
class LoraOptions(PairOptions):
    bias: bool = False
    """Also train a change of the site's bias."""


class LoraDelta(PairDelta):
    kinds = frozenset({"linear", "conv", "embedding", "parameter"})
    options: LoraOptions

    def build(self) -> None:
        if self.site.kind == "parameter":
            self.traits = Traits()  # packed experts are materialised: nothing to ride on
            *packed, rows, columns = self.site.shape
            self.parameter("A", *packed, self.options.rank, columns)
            self.parameter("B", *packed, rows, self.options.rank)
            return
        super().build()
        if self.options.bias:
            self.traits = Traits(changes_bias=True)
            self.parameter("c", self.site.out_features)

    def dense(self) -> Tensor:
        return PairDelta.factors(self).dense()

    def factors(self) -> LowRank | None:  # type: ignore[override]
        return None if self.site.kind == "parameter" else super().factors()

    def bias(self) -> Tensor | None:
        return self._parameters.get("c")


def _count(site: Site, o: LoraOptions) -> int:
    *packed, rows, columns = site.shape
    experts = packed[0] if packed else 1
    return experts * o.rank * (rows + columns) + (rows if o.bias else 0)


METHOD = Method(
    name="lora",
    title="LoRA: low-rank adaptation",
    paper="Hu et al., 2021, arXiv 2106.09685",
    axis="parameterisation",
    options=LoraOptions,
    delta=LoraDelta,
    count=per_site(_count),
    peft=pair_codec(marks={"use_dora": False}, more=lambda c: {"bias": bool(c.get("lora_bias"))}),
)
