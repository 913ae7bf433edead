"""SALT: scale and shift the top singular values of W, and a low-rank change among the others.

    W = U diag(S) V^T       U [out, q], V [in, q] frozen, q = min(out, in); conv: in k k

             ┌ diag(a S_top + b)        0        ┐
    M    =   │                                   │      W' = U M V^T
             └        0          diag(S) + X Y   ┘

a [k], b [k] act on the k largest singular values, X [q-k, r] and Y [r, q-k] on the rest:
dW = U_top diag(a S_top + b - S_top) V_top^T + (U_rest X) (Y V_rest^T), of rank k + r.
Start: a = 1, b = 0, X ~ N(0, 0.01^2) and Y = 0, exactly W (the paper draws Y like X and starts
beside it). The singular vectors are derived from W when the adapter is attached and never stored:
in float64 and with fixed signs, so that one file gives one dW whatever machine reads it.
Paper: Elsayed et al., 2025, arXiv 2503.16055. Parameters: 2 k + 2 r (q - k) a site.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from plait.adapter import Context, Delta, Method, Options, Site, Traits, per_site
from plait.adapter.choices import check_choices
from plait.errors import PlaitError
from plait.linalg import LowRank, canonical_svd


@dataclass(frozen=True)
class SaltOptions(Options):
    rank: int = 4
    """Rank r of the change among the lower singular directions (paper's configuration: 4)."""
    top: int | None = None
    """How many singular values k are scaled and shifted; None means half of them."""
    relu: Literal["values", "diagonal", "matrix", "none"] = "values"
    """What may not become negative: the k scaled values, the whole diagonal of M, or every entry
    of M as in the paper's code (which deletes the negative half of X Y). For "diagonal" and
    "matrix" dW is not low-rank and is rebuilt at each forward."""
    regularizer: float = 0.01
    """Weight of ||a S + b - S|| + ||X Y||, summed over sites, in `auxiliary_loss` (paper: 0.01)."""

    def __post_init__(self) -> None:
        check_choices(self, "salt")
        if self.rank < 0:
            raise PlaitError(f"rank must be at least 0, not {self.rank}.")

    def split(self, site: Site) -> tuple[int, int]:
        """(k, q - k) at a site."""
        q = min(site.out_features, site.in_features)
        top = q // 2 if self.top is None else self.top
        if not 0 <= top <= q:
            raise PlaitError(f"top={top} does not fit the {q} singular values of {site.path!r}.")
        return top, q - top


class SaltDelta(Delta):
    kinds = frozenset({"linear", "conv"})
    traits = Traits(low_rank=True, depends_on_base=True)
    options: SaltOptions
    a: Tensor
    b: Tensor
    X: Tensor
    Y: Tensor

    def build(self) -> None:
        if self.options.relu in ("diagonal", "matrix"):
            self.traits = Traits(depends_on_base=True)
        top, rest = self.options.split(self.site)
        self.parameter("a", top)
        self.parameter("b", top)
        self.parameter("X", rest, self.options.rank)
        self.parameter("Y", self.options.rank, rest)

    def reset(self) -> None:
        torch.nn.init.ones_(self.a)
        self.start("X", "normal")
        self.X.mul_(0.01)

    def attached(self) -> None:
        found = canonical_svd(self.site.weight().detach())
        for name, value in zip(("U", "S", "Vh"), found, strict=True):
            self.seeded_value(name, value.to(self.dtype))

    def seeded_tensors(self) -> dict[str, Tensor]:
        return {}  # derived from W, so their last bits are no promise of the seed

    def _singular(self) -> tuple[Tensor, Tensor, Tensor]:
        if "U" not in self._buffers:
            self.attached()  # raises where there is no base, naming the site
        return self.get_buffer("U"), self.get_buffer("S"), self.get_buffer("Vh")

    def _shift(self, S: Tensor) -> Tensor:
        """The change of the k top singular values."""
        top = S[: self.a.shape[0]]
        moved = self.a * top + self.b
        return (moved if self.options.relu == "none" else moved.relu()) - top

    def factors(self) -> LowRank | None:
        if not self.traits.low_rank:
            return None
        U, S, Vh = self._singular()
        top = self.a.shape[0]
        B = torch.cat([U[:, :top] * self._shift(S), U[:, top:] @ self.X], dim=1)
        A = torch.cat([Vh[:top], self.Y @ Vh[top:]], dim=0)
        return LowRank(B=B, A=A)

    def dense(self) -> Tensor:
        if self.traits.low_rank:
            return super().dense()
        U, S, Vh = self._singular()
        change = torch.block_diag(torch.diag(self._shift(S)), self.X @ self.Y)
        # relu(M) - diag(S), written so that an entry that is not clamped changes by exactly its XY.
        elsewhere = 0.0 if self.options.relu == "matrix" else -torch.inf
        floor = torch.full_like(change, elsewhere).diagonal_scatter(-S)
        return U @ torch.maximum(change, floor) @ Vh

    def regularization(self) -> Tensor:
        """||a S + b - S|| + ||X Y||, Frobenius norms, with gradient 0 at the start."""
        S = self._singular()[1][: self.a.shape[0]]
        shift = torch.linalg.vector_norm(self.a * S + self.b - S)
        square = ((self.X.t() @ self.X) * (self.Y @ self.Y.t())).sum()
        positive = square > 0
        return shift + torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)

    @classmethod
    def auxiliary_loss(cls, deltas: Sequence[Delta], context: Context) -> Tensor | None:
        ours = [d for d in deltas if isinstance(d, SaltDelta) and d.options.regularizer]
        terms = [d.options.regularizer * d.regularization() for d in ours]
        return torch.stack(terms).sum() if terms else None


def _count(site: Site, o: SaltOptions) -> int:
    top, rest = o.split(site)
    return 2 * top + 2 * o.rank * rest


METHOD = Method(
    name="salt",
    title="SALT: singular value adaptation with low-rank transformation",
    paper="Elsayed et al., 2025, arXiv 2503.16055",
    axis="parameterisation",
    options=SaltOptions,
    delta=SaltDelta,
    count=per_site(_count),
)
