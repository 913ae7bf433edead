"""HRA: W reflected at r hyperplanes, one after the other; orthogonal and low-rank at once.

    x ──► H_r ──► .. ──► H_2 ──► H_1 ──► W, b ──► y        H_i = I - 2 u_i u_i^T / |u_i|^2

W' = W H_1 .. H_r keeps the angles between the rows of W, their lengths and W's singular values. The
chain is I - U T U^T for unit columns U [in, r] and an upper triangular T [r, r] (the compact WY
form: T^-1 is I / 2 plus what of U^T U lies above its diagonal), so that dW = -(W U T) U^T has rank
r and rides the fused product: one product W U a forward beside LoRA's (fuse before generating), and
no [in, in] matrix. Equal neighbours u_1 = u_2, u_3 = u_4, .. cancel, which is the start for an even
r. With `orthogonal` the u_i are made orthonormal: W' = W (I - 2 U U^T), which no start makes W.
Paper: Yuan et al., 2024, arXiv 2405.17484. Parameters: r in a site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.adapter import Context, Delta, Method, Options, PeftCodec, Traits, per_site
from plait.adapter.formats.peft_codec import one_value
from plait.errors import PlaitError
from plait.kernels._gate import exact_dtypes
from plait.linalg import LowRank
from plait.methods._peft_plain import refuse_transposed


@dataclass(frozen=True)
class HraOptions(Options):
    rank: int = 8
    """How many reflections r (paper: 8); an odd chain cannot start at the base."""
    orthogonal: bool = False
    """Reflect at orthogonal hyperplanes (the paper's lambda = infinity)."""
    regularizer: float = 0.0
    """Weight lambda of |U^T U - I| in `auxiliary_loss`, over unit columns and summed over sites:
    what keeps hyperplanes apart (paper: tuned by task, 0 included)."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise PlaitError(f"rank must be at least 1, not {self.rank}.")


class HraDelta(Delta):
    kinds = frozenset({"linear", "conv"})
    options: HraOptions
    U: Tensor

    def build(self) -> None:
        rank, inputs = self.options.rank, self.site.in_features
        if self.options.orthogonal and rank > inputs:
            raise PlaitError(f"{self.site.path!r} has {inputs} inputs, too few for {rank=}.")
        whole = rank % 2 == 0 and not self.options.orthogonal
        self.traits = Traits(low_rank=True, depends_on_base=True, zero_start=whole)
        self.parameter("U", inputs, rank)

    def reset(self) -> None:
        self.start("U", "kaiming_uniform")
        if self.traits.zero_start:
            self.U[:, 1::2] = self.U[:, ::2]

    def factors(self) -> LowRank:
        with exact_dtypes(self.U.device.type):  # autocast would round T, and break the reflections
            return self._orthogonal() if self.options.orthogonal else self._chain()

    def _orthogonal(self) -> LowRank:
        Q = torch.linalg.qr(self.U).Q
        return LowRank(B=self._through_base(Q), A=Q.t(), scale=-2.0)

    def _chain(self) -> LowRank:
        U, gram = self._unit()
        # Only what lies above the diagonal is read: the order of the reflections.
        inverse = gram.triu(1) + 0.5 * torch.eye(len(gram), dtype=U.dtype, device=U.device)
        product = self._through_base(U)
        B = torch.linalg.solve_triangular(inverse, product, upper=True, left=False)
        return LowRank(B=B, A=U.t(), scale=-1.0)

    def _through_base(self, U: Tensor) -> Tensor:
        """W U [out, r], in W's precision."""
        W = self.site.weight().detach()
        return (W @ U.to(W.dtype)).to(U.dtype)

    def _unit(self) -> tuple[Tensor, Tensor]:
        """U with unit columns, and U^T U."""
        U = self.U / torch.linalg.vector_norm(self.U, dim=0)
        return U, U.t() @ U

    @classmethod
    def auxiliary_loss(cls, deltas: Sequence[Delta], context: Context) -> Tensor | None:
        ours = [d for d in deltas if isinstance(d, HraDelta) and d.options.regularizer]
        terms = [d.options.regularizer * d._crowding() for d in ours]
        return torch.stack(terms).sum() if terms else None

    def _crowding(self) -> Tensor:
        """|U^T U - I| for unit columns."""
        gram = self._unit()[1]
        return torch.linalg.vector_norm(gram - torch.eye(len(gram)).to(gram))


def _config(deltas: Mapping[str, Delta]) -> dict[str, Any]:
    refuse_transposed(deltas, "HRA")
    return {"r": one_value(deltas, "rank"), "apply_GS": one_value(deltas, "orthogonal")}


METHOD = Method(
    name="hra",
    title="HRA: Householder reflection adaptation",
    paper="Yuan et al., 2024, arXiv 2405.17484",
    axis="parameterisation",
    options=HraOptions,
    delta=HraDelta,
    count=per_site(lambda site, o: o.rank * site.in_features),
    peft=PeftCodec(
        type="HRA",
        keys={"U": "hra_u"},
        options=lambda found: {
            "rank": found.config["r"],
            "orthogonal": bool(found.config.get("apply_GS")),
        },
        config=_config,
        settings=("apply_GS",),
    ),
    example={"rank": 8},
)
