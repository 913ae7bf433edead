"""HypeLoRA: one small network writes every layer's LoRA factors.

    slot embedding e_l [k] ──► shared network ──► features h_l ──┬──► head B ──► B_l (out x r)
                                                                 └──► head A ──► A_l (r x in)
    x ──► A_l ──► B_l ──► * alpha / r ──► + W x

A site is a slot; sites whose outputs (inputs) are of one size share a head. `factor_a="fixed"`
draws A_l once and leaves it: the paper finds the lower calibration error there (see
`plait.evaluation.calibration`). "generated" adds what the head gives to that draw, because a head
that starts at 0 alone would leave A and B both at 0 without a gradient. Heads start at 0, so that
training starts at the base model; the released code starts them at random. Its other mixtures
(multiplying, annealing the draw away) and its A redrawn at each call are left out: the last has no
answer twice, and neither would be a LoRA that can be exported. What is generated is an exact
low-rank pair: fusing, export and switching are LoRA's. A head has r * size * features numbers, read
and written at each site: fast where a batch has many tokens, like LoRA's own step there.
Paper: Trojan and Gębala, 2026, arXiv 2603.19278. Parameters: k a site, the network, and
(features + 1) r (sum of distinct output sizes, and input sizes where A is generated).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from plait.adapter import Delta, Method, PairOptions, SharedTensors, Site, Traits
from plait.adapter.choices import check_choices
from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.methods import _hypernet


@dataclass(frozen=True)
class HypeLoraOptions(PairOptions):
    factor_a: Literal["fixed", "generated"] = "fixed"
    """Whether A_l stays as drawn, or the network adds to it."""
    network: Literal["mlp", "transformer"] = "mlp"
    """Each slot by itself, or all slots as the tokens of a small encoder."""
    embedding: int = 128
    """Length k of a slot's embedding (paper: 128), also the encoder's width."""
    hidden: int = 128
    """Width of the mlp's hidden layers."""
    depth: int = 1
    """Hidden layers of the mlp (paper: 1, large: 3), or layers of the encoder (paper: 2)."""
    heads: int = 8
    """The encoder's attention heads (paper: 8 to 16)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, "hypelora")
        if min(self.rank, self.embedding, self.hidden, self.depth, self.heads) < 1:
            raise PlaitError(
                "hypelora: rank, embedding, hidden, depth and heads must be at least 1."
            )
        if self.network == "transformer" and self.embedding % self.heads:
            raise PlaitError(
                f"hypelora: embedding {self.embedding} is no multiple of heads {self.heads}."
            )

    def sizes(self, sites: Sequence[Site]) -> dict[str, int]:
        """{head: size of a generated vector} over all sites."""
        found = {f"B_{s.out_features}": s.out_features for s in sites}
        if self.factor_a == "generated":
            found |= {f"A_{s.in_features}": s.in_features for s in sites}
        return found


class HypeLoraDelta(Delta):
    kinds = frozenset({"linear", "conv"})
    traits = Traits(low_rank=True)
    options: HypeLoraOptions
    A: Tensor

    @classmethod
    def prepare(
        cls, sites: Sequence[Site], options: HypeLoraOptions, shared: SharedTensors
    ) -> None:
        shared.notes["hypelora"] = {s.path: i for i, s in enumerate(sites)}, options
        shared.pool("slots", (len(sites), options.embedding), start="normal")
        _hypernet.make(shared, options)
        for name, size in options.sizes(sites).items():
            shared.pool(f"{name}_weight", (options.rank * size, _hypernet.width(options)))
            shared.pool(f"{name}_bias", (options.rank * size,))

    def build(self) -> None:
        slots, options = self.shared.notes["hypelora"]
        if self.options != options:
            raise PlaitError(
                f"overrides at {self.site.path!r} may not change hypelora's options, because one "
                "network serves all sites."
            )
        self.slot: int = slots[self.site.path]
        self.seeded("A", "kaiming_uniform", options.rank, self.site.in_features)

    def _generated(self, name: str, features: Tensor) -> Tensor:
        weight, bias = self.shared[f"{name}_weight"], self.shared[f"{name}_bias"]
        return F.linear(features, weight, bias).view(self.options.rank, -1)

    def factors(self) -> LowRank:
        features = _hypernet.features(self.shared, self.options, self.slot)
        A, B = self.A, self._generated(f"B_{self.site.out_features}", features)
        if self.options.factor_a == "generated":
            A = A + self._generated(f"A_{self.site.in_features}", features)
        return LowRank(B=B.mT, A=A, scale=self.options.scaling)


def _count(sites: Sequence[Site], o: HypeLoraOptions) -> int:
    network = sum(math.prod(shape) for shape in _hypernet.shapes(o).values())
    heads = o.rank * sum(o.sizes(sites).values()) * (_hypernet.width(o) + 1)
    return len(sites) * o.embedding + network + heads


METHOD = Method(
    name="hypelora",
    title="HypeLoRA: LoRA factors from one shared network",
    paper="Trojan and Gębala, 2026, arXiv 2603.19278",
    axis="parameterisation",
    options=HypeLoraOptions,
    delta=HypeLoraDelta,
    count=_count,
    example={"rank": 2, "embedding": 6, "hidden": 8},
)
