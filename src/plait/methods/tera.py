"""TeRA: frozen random tensor network for dW, of which a site trains the scales on the bonds.

    x (I_3 x I_4) ──► U_3^T, U_4^T ──► * d_3 d_4 ──► G ──► * d_1 d_2 ──► U_1, U_2 ──► + W x

dW = s (U_1 kron U_2) diag(d_1 kron d_2) G diag(d_3 kron d_4) (U_3 kron U_4)^T for `modes` = 2, out
= I_1 I_2 and in = I_3 I_4 cut into near-equal modes, U_k [I_k, R_k], G [R_1 R_2, R_3 R_4]. All U
and G are drawn from the adapter's seed, once for all sites of one shape, and never saved; entries
of dW have variance 1 / in when all d are 1. A site trains the d_k alone: 1 at the start, the last
one of the output side 0. The rank of dW reaches the product of the R_k of a side, with their sum
trained. Nothing of W's size is formed: a token meets one small product a mode, and G; with all
R_k = I_k, G is as large as W and costs as much as the base does.
Paper: Gu et al., 2025, arXiv 2509.03234 (start values and shapes are this file's choice).
Parameters: the sum of R_k a site.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from plait.adapter import Delta, Method, Options, SharedTensors, Site, per_site
from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.methods._modes import kron_all, mode_products, split_side
from plait.methods._ranges import check_ranges


@dataclass(frozen=True)
class TeraOptions(Options):
    rank: int = 16
    """Largest R_k; a smaller mode keeps R_k = I_k. G has the product of all R_k as entries."""
    modes: int = 2
    """Modes a side (paper: a tensor of order 4 to 6 in all)."""
    d_initial: float = 1.0
    """Start of all d but the zero one."""
    scaling: float = 1.0
    """Factor s on dW."""
    dropout: float = 0.0
    """Probability of dropping an input feature in training."""

    def __post_init__(self) -> None:
        check_ranges(self, "rank", "modes")

    def sizes(self, site: Site) -> list[tuple[int, int]]:
        """(I_k, R_k) of the output's modes, then of the input's."""
        sides = [split_side(size, self.modes) for size in site.shape]
        return [(size, min(size, self.rank)) for side in sides for size in side]


class TeraDelta(Delta):
    options: TeraOptions

    @classmethod
    def prepare(cls, sites: Sequence[Site], options: TeraOptions, shared: SharedTensors) -> None:
        shared.notes["tera"] = options.rank, options.modes
        for (rows, columns), site in {s.shape: s for s in sites}.items():
            sizes = options.sizes(site)
            for k, (size, rank) in enumerate(sizes):
                shared.frozen(f"U{k}_{rows}x{columns}", (size, rank), "normal")
                shared[f"U{k}_{rows}x{columns}"].div_(math.sqrt(rank))
            sides = sizes[: options.modes], sizes[options.modes :]
            left, right = (math.prod(rank for _, rank in side) for side in sides)
            shared.frozen(f"G_{rows}x{columns}", (left, right), "normal")
            shared[f"G_{rows}x{columns}"].div_(math.sqrt(columns))

    def build(self) -> None:
        if (self.options.rank, self.options.modes) != self.shared.notes["tera"]:
            raise PlaitError(
                f"overrides at {self.site.path!r} may not change rank or modes, because the random "
                "network is shared with other layers."
            )
        for k, (_, rank) in enumerate(self.options.sizes(self.site)):
            self.parameter(f"d{k}", rank)

    def reset(self) -> None:
        for k, parameter in enumerate(self.parameters()):
            parameter.data.fill_(0.0 if k == self.options.modes - 1 else self.options.d_initial)

    def _shared(self, name: str) -> Tensor:
        return self.shared[f"{name}_{self.site.out_features}x{self.site.in_features}"]

    def _side(self, first: int) -> tuple[list[Tensor], Tensor]:
        """The U_k of a side, and the Kronecker product of its d_k."""
        ks = range(first, first + self.options.modes)
        d: list[Tensor] = [self.get_parameter(f"d{k}") for k in ks]
        return [self._shared(f"U{k}") for k in ks], kron_all(d)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x = F.dropout(x, self.dropout) if self.dropout else x
        (rows, d_out), (columns, d_in) = self._side(0), self._side(self.options.modes)
        h = mode_products(x, [U.t().to(x.dtype) for U in columns])
        h = F.linear(h * (self.options.scaling * d_in).to(h.dtype), self._shared("G").to(h.dtype))
        return mode_products(h * d_out.to(h.dtype), [U.to(h.dtype) for U in rows])

    def dense(self) -> Tensor:
        left, right = self._halves()
        return left @ right

    def factors(self) -> LowRank | None:
        """For export, where a side's product of R_k is below the shorter side of W."""
        left, right = self._halves()
        return LowRank(B=left, A=right) if len(right) < min(self.site.shape) else None

    def _halves(self) -> tuple[Tensor, Tensor]:
        (rows, d_out), (columns, d_in) = self._side(0), self._side(self.options.modes)
        left, right = (kron_all(side) for side in (rows, columns))
        G = self.options.scaling * d_out[:, None] * self._shared("G") * d_in
        return (left, G @ right.t()) if len(G) <= G.shape[1] else (left @ G, right.t())


METHOD = Method(
    name="tera",
    title="TeRA: vector-based random tensor network adaptation",
    paper="Gu et al., 2025, arXiv 2509.03234",
    axis="parameterisation",
    options=TeraOptions,
    delta=TeraDelta,
    count=per_site(lambda site, o: sum(rank for _, rank in o.sizes(site))),
    example={"rank": 3},
)
