"""NLoRA: start StructuredLoRA at rows, columns and the corner of W: slices instead of an SVD.

    W = | K  F |      A = first r rows [K F]      B = first r columns [K; H]      R = K or K^+ / s
        | H  D |

Nyström's approximation of a matrix is W ~ [K; H] K^+ [K F], exact when W has rank r and K is
invertible: `middle="pinv"`. The authors' code leaves the pseudo-inverse out, R = K; this is the
default, because K^+ of a square corner amplifies its weakest directions (on SmolLM2-135M s B K^+ A
has ten times the norm of W) and then training is unstable. As in `pissa` the start is held back in
the adapter: W is not touched and the model starts at the base. The authors' code lets the model
start off by s B K A (`residual=False`), whose norm is about s r var(W) times W's: at r = 128 5 %
for weights from N(0, 0.02^2), but four times W on SmolLM2-135M (above 10 % it warns).
Rows of W are larger than a fresh A: take a lower learning rate. A rank above a site's shorter side
is lowered. Works with structured-lora and lora-xs; the preset `int-tune` trains R alone.
Paper: Guo et al., 2025, arXiv 2502.14482. Parameters: r (in + out) + r^2 a site.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from plait.adapter import Delta, Initializer, Method, Site
from plait.adapter.choices import check_choices
from plait.initializers._cores import require_core, set_core
from plait.methods.lora_xs import LoraXsDelta
from plait.methods.structured_lora import METHOD as STRUCTURED
from plait.methods.structured_lora import StructuredLoraDelta, StructuredLoraOptions

LARGE = 0.1


@dataclass
class Nystrom(Initializer):
    middle: Literal["corner", "pinv"] = "corner"
    """R = K as in the authors' code, or Nyström's K^+ (over the scaling)."""
    residual: bool = True
    """Hold the start back, so that training starts at the base model."""
    indices: Literal["first", "random", "largest"] = "first"
    """Which r rows and columns: the first (paper), drawn from the seed, or of largest norm."""
    rcond: float = 1e-4
    """Singular values of K below this share of the largest count as zero in K^+."""

    def __post_init__(self) -> None:
        check_choices(self, "nlora")

    def ranks(self, sites: Sequence[Site], statistics: dict[str, Any], rank: int) -> dict[str, int]:
        return {s.path: min(s.shape) for s in sites if rank > min(s.shape)}

    def start(self, delta: Delta, statistics: Any) -> None:
        core = require_core(delta, "nlora")
        W = core.base_weight()
        rows, columns = self._chosen(core, W, 0), self._chosen(core, W, 1)
        A, B = W[rows], W[:, columns]
        R = A[:, columns]
        if self.middle == "pinv":
            R = torch.linalg.pinv(R, rtol=self.rcond) / core.scaling
        set_core(core, A=A, R=R, B=B)
        if self.residual:
            core.hold_back()
            return
        share = float(core.trained().norm() / torch.linalg.vector_norm(W))
        if share > LARGE:
            warnings.warn(
                f"nlora: the start changes {core.site.path!r} by {share:.1g} of its norm; use "
                "residual=True.",
                stacklevel=2,
            )

    def _chosen(self, core: LoraXsDelta, W: Tensor, axis: int) -> Tensor:
        """The r indices along an axis of W [out, in], ascending."""
        if self.indices == "random":
            order = torch.randperm(W.shape[axis], generator=core.generator("nlora", str(axis)))
        elif self.indices == "largest":
            order = torch.linalg.vector_norm(W, dim=1 - axis).argsort(descending=True, stable=True)
        else:
            order = torch.arange(W.shape[axis])
        return order[: core.rank].sort().values.to(W.device)


METHOD = Method(
    name="nlora",
    title="NLoRA: Nyström-initiated low-rank adaptation",
    paper="Guo et al., 2025, arXiv 2502.14482",
    axis="initialisation",
    options=StructuredLoraOptions,
    delta=StructuredLoraDelta,
    count=STRUCTURED.count,
    initializer=Nystrom,
    example={"rank": 4},
)
