"""LoRA-SB: start LoRA-XS at the first step that full fine-tuning would take.

    D = -eta sign(sum of dL/dW) ~ U S V^T      A = V_r^T      R = diag(S_r) / s      B = U_r

D is AdamW's first step of the whole weight, eta = lr / warm-up steps; s B R A is its best rank-r
approximation, so that the model starts one approximate step away from the base. With A A^T = I,
B^T B = I and s = 1 a gradient step on R moves W by B B^T G A^T A, the closest that the subspace
allows to full fine-tuning's: no preconditioner is missing. Only R is trained; A and B are saved.
Works with lora-xs and structured-lora. Needs data for one gradient pass (authors: 50 to 170
samples, 0.1 % of the data). The sign makes D nearly full-rank: its singular values decay slowly.
A rank above a site's shorter side is lowered. In half precision A and B lose orthogonality; they
are float32.
Paper: Ponkshe et al., 2024, arXiv 2411.19557. Parameters: r^2 a site, whatever its width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from plait.adapter import Delta, Initializer, Method, PairOptions, Site, per_site
from plait.errors import PlaitError
from plait.initializers._cores import CoreDelta, require_core, set_core
from plait.linalg import randomized_svd
from plait.statistics import gradient_pass


@dataclass
class LoraSB(Initializer):
    lr: float = 1e-4
    """The peak learning rate that training will use (paper: 1e-4 for 7B models)."""
    warmup_steps: int = 1
    """The warm-up steps that training will use: the first step has lr / warmup_steps."""
    niter: int = 10
    """Power iterations of D's randomised SVD (authors: 10)."""

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.warmup_steps < 1:
            raise PlaitError(
                f"lora-sb: lr must be positive and warmup_steps at least 1, not {self.lr} and "
                f"{self.warmup_steps}."
            )

    def collect(
        self, model: nn.Module, sites: Sequence[Site], data: Iterable[Any] | None, rank: int
    ) -> dict[str, Any]:
        return dict(gradient_pass(model, sites, data or ()))

    def ranks(self, sites: Sequence[Site], statistics: dict[str, Any], rank: int) -> dict[str, int]:
        return {s.path: min(s.shape) for s in sites if rank > min(s.shape)}

    def start(self, delta: Delta, statistics: Tensor) -> None:
        core = require_core(delta, "lora-sb")
        D = statistics.to(core.A).sign().mul_(-self.lr / self.warmup_steps)
        g = core.generator("lora-sb")
        U, S, Vh = randomized_svd(D, core.rank, power_iterations=self.niter, generator=g)
        set_core(core, A=Vh, R=torch.diag(S / core.scaling), B=U)


@dataclass(frozen=True)
class LoraSbOptions(PairOptions):
    rank: int = 96
    """Rank r (paper: 32 to 128)."""
    alpha: float | None = None
    """Numerator of the scaling alpha / r; None means r, the scaling of 1 that the theory asks."""

    @property
    def scaling(self) -> float:
        return 1.0 if self.alpha is None else super().scaling


METHOD = Method(
    name="lora-sb",
    title="LoRA-SB: initialisation by an approximation of the first update",
    paper="Ponkshe et al., 2024, arXiv 2411.19557",
    axis="initialisation",
    options=LoraSbOptions,
    delta=CoreDelta,
    count=per_site(lambda site, o: o.rank**2),
    initializer=LoraSB,
    example={"rank": 5},
)
