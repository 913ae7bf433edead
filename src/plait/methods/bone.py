"""Bone: one small block of numbers shared by all blocks of W (MiSS), or multiplied into them (Bat).

    miss    x ──► cut into slices of r features ──► summed ──► D (r x out) ──► + W x
            dW[:, block j] = D^T for every j (the last block cut off where r does not divide in)
    mini    D (r x m) repeated out / m times along the output (`mini_r` = m)
    bat     dW_ij = W_ij D_i + D_i for the r x r blocks of W, D (out/r x r x r), i the output block

D = 0 at the start. MiSS has rank r and costs one product of inner size r; Bat follows W, has full
rank in general, needs an r that divides both sides, and builds W + dW at every forward. There is no
scaling, and D moves in/r tied blocks at once: use a far smaller learning rate than LoRA's.
Paper: Kang, Yin, 2024, arXiv 2409.15371. Parameters: r out a site, or r m with mini_r.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from plait.adapter import Delta, Method, Options, PeftCodec, Site, Traits, first_input, per_site
from plait.adapter.formats.peft_codec import one_value
from plait.adapter.method import PeftSite
from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.methods._bat import bat_change, bat_shape


@dataclass(frozen=True)
class BoneOptions(Options):
    rank: int = 64
    """Size r of a block (paper: 64, as many parameters as LoRA of rank 36 on Llama)."""
    variant: Literal["miss", "bat"] = "miss"
    """The sum of slices (the paper's later form), or the multiplicative form that it began with."""
    mini_r: int | None = None
    """Width m of D, repeated along the output; must divide it. None means the whole output."""
    dropout: float = 0.0
    """Probability of dropping an input feature in training."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise PlaitError(f"rank must be at least 1, not {self.rank}.")
        if self.variant not in ("miss", "bat"):
            raise PlaitError(f"variant must be 'miss' or 'bat', not {self.variant!r}.")
        if self.variant == "bat" and self.mini_r is not None:
            raise PlaitError("mini_r belongs to variant 'miss'; leave it out for 'bat'.")
        if not 0 <= self.dropout < 1:
            raise PlaitError(f"dropout must lie in [0, 1), not {self.dropout}.")

    def shape(self, site: Site) -> tuple[int, ...]:
        """The shape of D at a site."""
        if self.variant == "bat":
            return bat_shape(site, self.rank)
        rows = site.out_features
        width = rows if self.mini_r is None else self.mini_r
        if width < 1 or rows % width:
            raise PlaitError(f"mini_r={width} does not divide the {rows} outputs of {site.path!r}.")
        return self.rank, width


class BoneDelta(Delta):
    options: BoneOptions
    D: Tensor

    def build(self) -> None:
        if self.options.variant == "bat":
            self.traits = Traits(depends_on_base=True)
        self.parameter("D", *self.options.shape(self.site))

    def adapt(self, *args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = first_input(args, kwargs)
        seen = F.dropout(x, self.options.dropout, self.training)
        if self.options.variant == "bat":
            if seen is not x:
                return super().adapt(x)
            bias = self.site.bias()  # one product with W + dW instead of two
            y = self.site.apply(x, (self.base_weight() + self.dense()).to(x.dtype))
            return y if bias is None else y + bias
        y = self.site.forward(x)
        if self.options.mini_r is not None:
            return y + self._mini(seen).to(y.dtype)
        total = self._slice_sum(seen).to(y.dtype)
        flat = torch.addmm(y.flatten(0, -2), total.flatten(0, -2), self.D.to(y.dtype))
        return flat.view(y.shape)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x = F.dropout(x, self.options.dropout, self.training)
        return super().forward(x) if self.options.variant == "bat" else self._mini(x)

    def _slice_sum(self, x: Tensor) -> Tensor:
        """[..., r]: the sum of x's slices of r features, the last one padded with zeros."""
        r = self.options.rank
        slices, left = divmod(x.shape[-1], r)
        total = x[..., : slices * r].unflatten(-1, (slices, r)).sum(-2)
        return total + F.pad(x[..., slices * r :], (0, r - left)) if left else total

    def _mini(self, x: Tensor) -> Tensor:
        change = F.linear(self._slice_sum(x), self.D.t().to(x.dtype))
        times = self.site.out_features // self.D.shape[1]
        return change.repeat(*[1] * (change.dim() - 1), times) if times > 1 else change

    def factors(self) -> LowRank | None:
        """B = D^T and A = the identity repeated along the input, for export; None for Bat."""
        if self.options.variant == "bat":
            return None
        inputs = torch.arange(self.site.in_features, device=self.D.device)
        A = F.one_hot(inputs % self.options.rank, self.options.rank).t().to(self.D.dtype)
        times = self.site.out_features // self.D.shape[1]
        return LowRank(B=self.D.t().repeat(times, 1), A=A)

    def dense(self) -> Tensor:
        if self.options.variant == "miss":
            return super().dense()
        return bat_change(self.base_weight(), self.D)


def _options(found: PeftSite) -> dict[str, Any]:
    form = found.config.get("init_weights", True)
    return {
        "rank": found.config["r"],
        "variant": "bat" if form == "bat" else "miss",
        "mini_r": found.config["mini_r"] if form == "mini" else None,
        "dropout": found.config.get("miss_dropout", 0.0),
    }


def _config(deltas: Mapping[str, Delta]) -> dict[str, Any]:
    config = {"r": one_value(deltas, "rank"), "miss_dropout": one_value(deltas, "dropout")}
    if one_value(deltas, "variant") == "bat":
        return config | {"init_weights": "bat"}
    width = one_value(deltas, "mini_r")
    return config | ({} if width is None else {"init_weights": "mini", "mini_r": width})


METHOD = Method(
    name="bone",
    title="Bone: block affine adaptation, and its successor MiSS",
    paper="Kang, Yin, 2024, arXiv 2409.15371",
    axis="parameterisation",
    options=BoneOptions,
    delta=BoneDelta,
    count=per_site(lambda site, o: math.prod(o.shape(site))),
    peft=PeftCodec(type="MISS", keys={"D": "miss_block"}, options=_options, config=_config),
    example={"rank": 4},
)
