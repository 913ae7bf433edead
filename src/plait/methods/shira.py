"""SHiRA: train a sparse set of W's entries, whatever the rank of that change.

    x ──► W + s * scatter(indices, values) ──► y

dW is zero but at p fixed positions, whose values [p] start at 0: training starts at the base model.
`mask` says which positions: "rand" (uniform, regenerated from the seed), "struct" (whole rows and
columns and the diagonal, which makes dW full-rank; from the seed too), "wm" (the largest |W|),
"grad" and "snip" (the largest |g| and |W g| of calibration batches, through `MaskFromGradient`).
The product is a sparse one, beside any base, and backward samples g^T x at the p positions: no
copy of W and no dense dW exists. Fusing writes p entries of W, and takes them back as they were.
Devices without sparse products form dW instead.
Paper: Bhardwaj et al., 2024, arXiv 2406.13175. Parameters: p a site (density, or r (in + out)).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from plait.adapter import Delta, Initializer, Method, Options, Site, per_site
from plait.adapter.choices import check_choices
from plait.errors import PlaitError
from plait.kernels._gate import plain_path
from plait.methods._masks import budget, draw, entries, structured
from plait.methods._shira_peft import PEFT
from plait.methods._sparse import Layout, has_sparse, make_layout, sparse_linear
from plait.statistics import gradient_pass


@dataclass(frozen=True)
class ShiraOptions(Options):
    density: float = 0.01
    """Share of W's entries that train (paper: 0.01 to 0.02)."""
    rank: int | None = None
    """Train as many entries as LoRA of this rank, r (in + out), instead of `density`."""
    mask: Literal["rand", "struct", "wm", "grad", "snip"] = "rand"
    """Which entries; the paper prefers wm and snip for language models."""

    def __post_init__(self) -> None:
        check_choices(self, "shira")
        if not 0 < self.density <= 1 or (self.rank is not None and self.rank < 1):
            raise PlaitError(
                f"density must lie in (0, 1] and rank be at least 1, not {self.density} and "
                f"{self.rank}."
            )


class ShiraDelta(Delta):
    kinds = frozenset({"linear", "conv"})
    options: ShiraOptions
    values: Tensor
    indices: Tensor  # sorted, into the flattened W

    def build(self) -> None:
        count, total = entries(self.site, self.options), math.prod(self.site.shape)
        self.parameter("values", count)
        kind = torch.int32 if total < 2**31 else torch.int64
        if self.options.mask == "rand":
            self.seeded_value("indices", draw(total, count, self.generator("mask")).to(kind))
        elif self.options.mask == "struct":
            found = structured(self.site, budget(self.site, self.options), self.generator("mask"))
            self.seeded_value("indices", found.to(kind))
        else:
            self.frozen("indices", count, dtype=kind)
        self._layout: tuple[Any, Layout] | None = None

    def reset(self) -> None:
        if self.options.mask == "wm":
            self.choose(self.base_weight().abs())

    def choose(self, scores: Tensor) -> None:
        """Train the entries with the largest scores [out, in]."""
        top = scores.flatten().topk(len(self.values), sorted=False).indices
        self.indices.copy_(top.sort().values)

    def attached(self) -> None:
        if len(self.indices) > 1 and not self.indices[-1]:
            raise PlaitError(
                f"shira at {self.site.path!r}: mask {self.options.mask!r} comes from gradients; "
                "attach with initializer=MaskFromGradient() and data=<batches>."
            )

    def dense(self) -> Tensor:
        flat = self.values.new_zeros(math.prod(self.site.shape))
        return flat.index_copy(0, self.indices.long(), self.values).view(self.site.shape)

    def sparse(self) -> tuple[Tensor, Tensor]:
        return self.indices, self.values

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if self.site.kind == "conv" or plain_path(x, self.values) or not has_sparse(x.device):
            return super().forward(x, y)
        return sparse_linear(x, self.values, self.layout())

    def layout(self) -> Layout:
        """The positions by rows and by columns, made again when they were written or moved."""
        now = (self.indices.device, self.indices._version)
        if self._layout is None or self._layout[0] != now:
            self._layout = (now, make_layout(self.indices.long(), *self.site.shape))
        return self._layout[1]


@dataclass
class MaskFromGradient(Initializer):
    """Choose the entries of `mask="grad"` (largest |g|) or `"snip"` (largest |W g|)."""

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})

    def collect(
        self, model: nn.Module, sites: Sequence[Site], data: Iterable[Any] | None, rank: int
    ) -> dict[str, Any]:
        return dict(gradient_pass(model, sites, data or ()))

    def start(self, delta: Delta, statistics: Tensor) -> None:
        if not isinstance(delta, ShiraDelta) or delta.options.mask not in ("grad", "snip"):
            raise PlaitError(
                f"MaskFromGradient at {delta.site.path!r} needs shira with mask='grad' or 'snip'."
            )
        scores = statistics.to(delta.device).abs()
        if delta.options.mask == "snip":
            scores = scores * delta.base_weight().abs()
        delta.choose(scores)


METHOD = Method(
    name="shira",
    title="SHiRA: sparse high rank adapters",
    paper="Bhardwaj et al., 2024, arXiv 2406.13175",
    axis="parameterisation",
    options=ShiraOptions,
    delta=ShiraDelta,
    count=per_site(entries),
    peft=PEFT,
)
