"""MoS: layers of one kind draw the rows of their A and B from shared pools of shards.

    pool A [e L, in]  ──cut into l shards a row──► row k of A  = l shards drawn for this layer
    pool B [e L, out] ──cut into l shards a row──► column k of B, drawn independently
    dW = scaling * B A,  A [r, in], B [out, r], r > e

L layers of one kind (same last name and shape) own one pair of pools and train what LoRA of rank
e trains, but each works at a rank r of four to eight times e. The draw is fixed by the seed:
r - e_p vectors of public shards, none twice in a layer, and e_p of shards that no other layer
uses. Nothing depends on the input, so fusing, export and switching are LoRA's. A side that l does
not divide is padded and cut. Pool A starts at U(-1/sqrt(in), 1/sqrt(in)), pool B at zero.
A and B are gathered at each forward: that copies r (in + out) numbers, and micro-batches could not
share the autograd graph of one gathering anyway.
Paper: Wang et al., 2024, arXiv 2410.00938. Parameters: e (in + out) a site, padding aside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from plait.adapter import Delta, Method, Options, SharedTensors, Site, Traits
from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.methods._shards import Place, padded, places


@dataclass(frozen=True)
class MosOptions(Options):
    equivalent_rank: int = 2
    """Rank e of the LoRA that has as many parameters (paper: 2 to 8); the same at all sites."""
    rank: int | None = None
    """Rank r of dW; None takes 8 e, or all that the pools hold where that is less."""
    private_rank: int = 1
    """How many of the r vectors use shards of this layer alone (paper: 1, between 0 and e)."""
    shards: int = 4
    """Into how many shards l a vector is cut (paper: 2 to 8)."""
    alpha: float | None = None
    """Numerator of the scaling alpha / r; None means 2 r, a scaling of 2."""
    dropout: float = 0.0
    """Probability of dropping an input feature in training."""

    def __post_init__(self) -> None:
        if self.equivalent_rank < 1 or self.shards < 1:
            raise PlaitError(
                f"equivalent_rank ({self.equivalent_rank}) and shards ({self.shards}) must be "
                "at least 1."
            )
        if not 0 <= self.private_rank <= self.equivalent_rank:
            raise PlaitError(
                f"private_rank {self.private_rank} must lie between 0 and equivalent_rank "
                f"{self.equivalent_rank}."
            )
        if not 0 <= self.dropout < 1:
            raise PlaitError(f"dropout must lie in [0, 1), not {self.dropout}.")

    @property
    def pools(self) -> tuple[int, int, int]:
        """What shapes the pools, and so must agree at all sites."""
        return self.equivalent_rank, self.private_rank, self.shards

    def active_rank(self, layers: int, path: str) -> int:
        """r at a site whose kind has so many layers."""
        e, private = self.equivalent_rank, self.private_rank
        most = (e - private) * layers + private
        rank = min(8 * e, most) if self.rank is None else self.rank
        if not private <= rank <= most or rank < 1:
            raise PlaitError(
                f"rank {rank} at {path!r} does not fit: its pools hold {private} private and "
                f"{most - private} public vectors for {layers} layers; choose {max(private, 1)} "
                f"to {most}, or a larger equivalent_rank."
            )
        return rank


class MosDelta(Delta):
    kinds = frozenset({"linear", "conv"})
    traits = Traits(low_rank=True)
    options: MosOptions
    index_A: Tensor
    index_B: Tensor

    @classmethod
    def prepare(cls, sites: Sequence[Site], options: MosOptions, shared: SharedTensors) -> None:
        table = places(sites)
        shared.notes["mos"] = table, options.pools
        for site in sites:
            place = table[site.path]
            if place.index > 0:
                continue
            rows = options.equivalent_rank * place.layers
            columns = padded(site.in_features, options.shards)
            shared.pool(f"A_{place.pool}", (rows, columns), start="kaiming_uniform")
            shared.pool(f"B_{place.pool}", (rows, padded(site.out_features, options.shards)))

    def build(self) -> None:
        table, pools = self.shared.notes["mos"]
        if self.options.pools != pools:
            raise PlaitError(
                f"overrides at {self.site.path!r} may not change equivalent_rank, private_rank or "
                "shards, because its pools are shared with other layers."
            )
        self.place: Place = table[self.site.path]
        self.rank = self.options.active_rank(self.place.layers, self.site.path)
        for side in ("A", "B"):
            drawn = self.place.draw(pools, self.rank, self.generator("shards", side))
            self.seeded_value(f"index_{side}", drawn)

    @property
    def scaling(self) -> float:
        return 2.0 if self.options.alpha is None else self.options.alpha / self.rank

    def _vectors(self, side: str, index: Tensor, size: int) -> Tensor:
        """[r, size]: this layer's vectors, put together from the pool's shards."""
        pool = self.shared[f"{side}_{self.place.pool}"]
        shards = pool.view(-1, pool.shape[1] // self.options.shards)
        return shards.index_select(0, index).view(self.rank, -1)[:, :size]

    def factors(self) -> LowRank:
        A = self._vectors("A", self.index_A, self.site.in_features)
        B = self._vectors("B", self.index_B, self.site.out_features)
        return LowRank(B=B.t(), A=A, scale=self.scaling)


def _count(sites: Sequence[Site], o: MosOptions) -> int:
    sizes = [padded(n, o.shards) for s in sites for n in (s.in_features, s.out_features)]
    return o.equivalent_rank * sum(sizes)


METHOD = Method(
    name="mos",
    title="MoS: mixture of shards",
    paper="Wang et al., 2024, arXiv 2410.00938",
    axis="parameterisation",
    options=MosOptions,
    delta=MosDelta,
    count=_count,
)
