"""A pair whose leading components are an adapter of their own, at every rank.

dW_b = (alpha / b) B[:, :b] A[:b]        b = 1 .. r
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from plait.adapter import Pair, PairDelta, PairOptions, Site
from plait.linalg import LowRank


@dataclass(frozen=True)
class NestedOptions(PairOptions):
    rank: int = 8
    """The greatest rank, down to 1 from which the adapter can be cut (paper: 8, up to 64)."""


class NestedDelta(PairDelta):
    options: NestedOptions
    leading: int | None = None
    """How many components count in the pass that trains now; None is all of them."""
    last_only: bool = False
    """Of these, only the last one gets a gradient."""

    def trained(self) -> LowRank:
        return super().trained() if self.leading is None else self.cut(self.leading, self.last_only)

    def cut(self, rank: int, last_only: bool = False) -> LowRank:
        """dW_b for b = `rank`, or for all components where there are fewer."""
        b = min(rank, self.rank)
        A, B = self.A[:b], self.B[:, :b]
        if last_only:
            A = torch.cat([A[: rank - 1].detach(), A[rank - 1 :]])
            B = torch.cat([B[:, : rank - 1].detach(), B[:, rank - 1 :]], dim=1)
        return LowRank(B=B, A=A, scale=self._alpha() / self._root(b))

    def plain_options(self, rank: int) -> dict[str, Any]:
        """Options of the plain LoRA that `cut(rank)` is."""
        o = self.options
        kept = {"alpha": self._alpha(), "rslora": o.rslora, "dropout": o.dropout}
        return {"rank": min(rank, self.rank), **kept}

    def _alpha(self) -> float:
        return self.scaling * self._root(self.rank)

    def _root(self, rank: int) -> float:
        return max(rank, 1) ** (0.5 if self.options.rslora else 1.0)

    def pairs(self) -> list[Pair]:
        return []  # in training dW is not scaling * B A, which is what rules over pairs assume


def nested_count(site: Site, o: NestedOptions) -> int:
    return o.rank * (site.in_features + site.out_features)
