"""VeRA: one frozen random pair for the whole model; a site trains two vectors.

    x ──► A[:, :in] ──► * d ──► B[:out] ──► * b ──► + W x      A, B shared by all sites, frozen

dW = diag(b) B diag(d) A, with d = 0.1 and b = 0, so that training starts at the base model. A
[r, widest in] and B [widest out, r] are drawn once from the adapter's seed, U(-sqrt(6 / columns),
sqrt(6 / columns)) as in the authors' code, and never saved; a site takes their leading columns and
rows. Both vectors ride on B's side of the fused product: only A x [r, tokens] is kept for backward,
neither x nor any [tokens, out] copy. No alpha / r factor.
Paper: Kopiczko et al., 2023, arXiv 2310.11454. Parameters: r + out a site.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.adapter import Delta, Method, Options, PeftCodec, SharedTensors, Site, Traits, per_site
from plait.adapter.formats.peft_codec import any_transposed, one_value
from plait.errors import PlaitError
from plait.linalg import LowRank


@dataclass(frozen=True)
class VeraOptions(Options):
    rank: int = 256
    """Rank r of the shared pair (paper: 256 to 1024; it costs time, hardly parameters)."""
    d_initial: float = 0.1
    """Start of d; 1e-7 to 1 in the paper's ablation."""
    dropout: float = 0.0
    """Probability of dropping an input feature in training."""


class VeraDelta(Delta):
    kinds = frozenset({"linear", "conv"})
    traits = Traits(low_rank=True)
    options: VeraOptions
    b: Tensor
    d: Tensor

    @classmethod
    def prepare(cls, sites: Sequence[Site], options: VeraOptions, shared: SharedTensors) -> None:
        columns = max((s.in_features for s in sites), default=0)
        rows = max((s.out_features for s in sites), default=0)
        for name, shape in {"A": (options.rank, columns), "B": (rows, options.rank)}.items():
            shared.frozen(name, shape, "uniform")
            shared[name].mul_(math.sqrt(6 / max(shape[1], 1)))

    def build(self) -> None:
        if self.options.rank > len(self.shared["A"]):
            raise PlaitError(
                f"rank {self.options.rank} at {self.site.path!r} exceeds the shared pair's "
                f"{len(self.shared['A'])}; overrides= may only lower it."
            )
        self.parameter("d", self.options.rank)
        self.parameter("b", self.site.out_features)

    def reset(self) -> None:
        with torch.no_grad():
            self.d.fill_(self.options.d_initial)

    def factors(self) -> LowRank:
        rank = self.options.rank
        A = self.shared["A"][:rank, : self.site.in_features].to(self.b.dtype)
        B = self.shared["B"][: self.site.out_features, :rank].to(self.b.dtype)
        return LowRank(B=self.b[:, None] * (B * self.d), A=A)


def _count(site: Site, o: VeraOptions) -> int:
    return o.rank + site.out_features


METHOD = Method(
    name="vera",
    title="VeRA: vector-based random matrix adaptation",
    paper="Kopiczko et al., 2023, arXiv 2310.11454",
    axis="parameterisation",
    options=VeraOptions,
    delta=VeraDelta,
    count=per_site(_count),
    peft=PeftCodec(
        type="VERA",
        keys={"d": "vera_lambda_d", "b": "vera_lambda_b"},
        shared={"A": "base_model.vera_A", "B": "base_model.vera_B"},
        options=lambda found: {
            "rank": found.config["r"],
            "dropout": found.config.get("vera_dropout", 0.0),
        },
        config=lambda deltas: {
            "r": one_value(deltas, "rank"),
            "vera_dropout": one_value(deltas, "dropout"),
            "fan_in_fan_out": any_transposed(deltas),
        },
    ),
)
