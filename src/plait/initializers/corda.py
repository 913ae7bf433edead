"""CorDA: start a pair at directions of W weighed by what the site reads.

    C = X^T X / N + damping    W C = U S V^T    B = U_r sqrt(S_r / s)    A = U_r^T W / sqrt(S_r s)

s B A = U_r U_r^T W: the part of W whose outputs on the data are largest ("ipm", instruction
preview: learn the task of the data quickly) or smallest ("kpm", knowledge preservation: change what
the data of past knowledge hardly uses). The paper's A is sqrt(S_r / s) V_r^T C^-1, the same matrix,
since S V^T C^-1 = U^T W: no inverse is taken here, nor a damping searched that makes it accurate.
C is divided by its mean diagonal, as the unit of the inputs would otherwise move size from A to B.
What the paper subtracts from W is held back in the adapter, as in `pissa`: W is not touched and the
model starts at the base. Works with any method that trains a pair.
Needs data for a forward pass (paper: 256 samples of 2048 tokens), in^2 numbers a distinct input and
a float64 SVD a site (the smallest directions are asked for). Sites that read tokens (embeddings) or
many inputs (packed experts) keep the method's own start.
Paper: Yang et al., 2024, arXiv 2406.05223. Parameters: r (in + out) a site.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from plait.adapter import Delta, Initializer, Method, Site
from plait.adapter.choices import check_choices
from plait.errors import PlaitError
from plait.initializers._pairs import require_pair, set_leading
from plait.linalg import gram_directions, mapped_directions
from plait.methods.lora import METHOD as LORA
from plait.methods.lora import LoraDelta, LoraOptions
from plait.statistics import SecondMoment, activation_pass


@dataclass
class Corda(Initializer):
    mode: Literal["ipm", "kpm"] = "ipm"
    """Train the directions that the data uses most, or those that it uses least."""
    damp: float = 0.01
    """Added to C's diagonal, as a share of its mean (paper: 0.01)."""
    ignore_unlabelled: bool = False
    """Leave out tokens whose label is -100, as well as padding."""

    needs: ClassVar[frozenset[str]] = frozenset({"input_covariance"})

    def __post_init__(self) -> None:
        check_choices(self, "corda")
        if self.damp <= 0:
            raise PlaitError(f"corda: damp must be positive, not {self.damp}.")

    def collect(
        self, model: nn.Module, sites: Sequence[Site], data: Iterable[Any] | None, rank: int
    ) -> dict[str, Any]:
        reading = [s for s in sites if s.kind in ("linear", "conv")]
        if not reading:
            return {}
        skip = self.ignore_unlabelled
        found = activation_pass(model, reading, data or (), SecondMoment(), ignore_unlabelled=skip)
        return dict(found)

    def start(self, delta: Delta, statistics: Tensor | None) -> None:
        pair = require_pair(delta, "corda")
        if statistics is None or pair.rank == 0:
            return
        W = pair.base_weight().double()
        U, S = self._directions(W @ self._weighing(statistics.to(W)), pair.rank)
        # Directions that W maps to nothing stay at zero instead of 0 / 0.
        least = max(float(S.max()) * torch.finfo(S.dtype).eps, torch.finfo(S.dtype).tiny)
        root = (S.clamp_min(least) * pair.scaling).sqrt()
        set_leading(pair, A=(U.T @ W) / root[:, None], B=U * root / pair.scaling)
        pair.hold_back()

    def _directions(self, M: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """U [out, r] and S [r] of M's largest (ipm) or smallest (kpm) singular triplets."""
        if self.mode == "ipm":  # the small end of a squared spectrum would be lost, this is not
            rows, S, flat = gram_directions(M)
            rows = rows[:rank] if flat else mapped_directions(M, rows[:rank], flat)
            return rows.T, S[:rank]
        U, S, _ = torch.linalg.svd(M, full_matrices=False)
        first = max(len(S) - rank, 0)
        return U[:, first:], S[first:]

    def _weighing(self, moment: Tensor) -> Tensor:
        """C [in, in] with a mean diagonal of 1 + damp; the identity where no token was seen."""
        eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        mean = float(moment.diagonal().mean())
        return moment / mean + self.damp * eye if mean > 0 else eye


METHOD = Method(
    name="corda",
    title="CorDA: context-oriented decomposition adaptation",
    paper="Yang et al., 2024, arXiv 2406.05223",
    axis="initialisation",
    options=LoraOptions,
    delta=LoraDelta,
    count=LORA.count,
    initializer=Corda,
)
