"""HiRA: a low-rank pattern that multiplies W entry by entry, so that dW has high rank.

    x ──► W * (1 + B A) ──► y       A [r, in], B [out, r], * entry by entry

dW = W * (B A), of rank up to r rank(W), with A ~ U(-1/sqrt(in), 1/sqrt(in)) and B = 0, so that
training starts at the base model. There is no scaling. On an embedding A is the table (A = 0,
B ~ N(0, 1)) and only the rows that are looked up are multiplied; on a convolution the pattern
covers the unrolled kernel. A linear builds W + dW at every forward (r + 1 operations an entry of W,
whatever the number of tokens), multiplies once, and keeps neither it nor B A for backward, where
g^T x costs half of the base's step more.
Paper: Huang et al., HiRA, ICLR 2025. Parameters: r (in + out) a site.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from plait.adapter import Delta, Method, Options, PeftCodec, Traits, first_input, per_site
from plait.adapter.formats.peft_codec import any_transposed, one_value
from plait.adapter.method import PeftSite
from plait.errors import PlaitError
from plait.methods._folded import folded_linear, has_plain_weight

LINEAR, EMBEDDING = ("hira_A", "hira_B"), ("hira_embedding_A", "hira_embedding_B")


@dataclass(frozen=True)
class HiraOptions(Options):
    rank: int = 32
    """Rank r of the pattern B A (paper: 32)."""
    dropout: float = 0.0
    """Probability of dropping an input feature in training."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise PlaitError(
                f"rank must be at least 1 and dropout lie in [0, 1), not {self.rank} and "
                f"{self.dropout}."
            )


class HiraDelta(Delta):
    kinds = frozenset({"linear", "conv", "embedding"})
    traits = Traits(depends_on_base=True)
    options: HiraOptions
    A: Tensor
    B: Tensor

    def build(self) -> None:
        self.parameter("A", self.options.rank, self.site.in_features)
        self.parameter("B", self.site.out_features, self.options.rank)

    def reset(self) -> None:
        if self.site.kind == "embedding":
            self.start("B", "normal")
        else:
            self.start("A", "kaiming_uniform")

    def make(self, A: Tensor, B: Tensor) -> Tensor:
        return (B @ A).mul(self.base_weight())

    def pull(self, G: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        G = G * self.base_weight()
        return B.t() @ G, G @ A.t()

    def dense(self) -> Tensor:
        return self.make(self.A, self.B)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if self.site.kind == "conv":
            return super().forward(x, y)
        if self.site.kind == "embedding":
            pattern = self.site.apply_low_rank(x, self.A, self.B)
            return F.embedding(x, self.site.weight().t()) * pattern
        return folded_linear(F.dropout(x, self.dropout), self, (self.A, self.B))

    def adapt(self, *args: Any, **kwargs: Any) -> Any:
        if self.site.kind != "linear" or self.dropout or not has_plain_weight(self.site):
            return super().adapt(*args, **kwargs)
        x = first_input(args, kwargs)
        return folded_linear(x, self, (self.A, self.B), self.site.weight(), self.site.bias())


def _options(found: PeftSite) -> dict[str, Any]:
    stored = next((found.tensors[n] for n in ("hira_A", EMBEDDING[0]) if n in found.tensors), None)
    rank = found.config["r"] if stored is None else len(stored)
    return {"rank": rank, "dropout": found.config.get("hira_dropout") or 0.0}


def _config(deltas: Mapping[str, Delta]) -> dict[str, Any]:
    return {
        "r": one_value(deltas, "rank"),  # PEFT's rank_pattern has no effect here
        "hira_dropout": one_value(deltas, "dropout"),
        "fan_in_fan_out": any_transposed(deltas),
    }


def _read(delta: Delta, found: PeftSite) -> None:
    names = EMBEDDING if delta.site.kind == "embedding" else LINEAR
    for own, theirs in zip("AB", names, strict=True):
        delta.get_parameter(own).copy_(found.tensors[theirs].flatten(1))


def _write(delta: Delta) -> dict[str, Tensor]:
    A, B = (dict(delta.own_tensors())[name] for name in "AB")
    if delta.site.kind == "conv":
        kernel = delta.site.details["kernel"]
        A, B = A.reshape(-1, *kernel), B.reshape(*B.shape, *[1] * (len(kernel) - 1))
    names = EMBEDDING if delta.site.kind == "embedding" else LINEAR
    return dict(zip(names, (A, B), strict=True))


METHOD = Method(
    name="hira",
    title="HiRA: Hadamard high-rank adaptation",
    paper="Huang et al., ICLR 2025",
    axis="parameterisation",
    options=HiraOptions,
    delta=HiraDelta,
    count=per_site(lambda site, o: o.rank * (site.in_features + site.out_features)),
    peft=PeftCodec(
        type="HIRA",
        keys={name: name for name in (*LINEAR, *EMBEDDING)},
        options=_options,
        config=_config,
        read=_read,
        write=_write,
        settings=("hira_dropout",),
    ),
)
