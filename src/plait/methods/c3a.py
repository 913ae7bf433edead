"""C3A: dW is a grid of circulant blocks, of which each has one row's worth of parameters.

    x ──► cut into blocks of b ──rfft──► * conj(rfft(w)) ──irfft──► laid side by side ──► + W x

dW = C / in, where block (i, j) of C is circulant: C_ij[p, q] = w[i, j, (q - p) mod b], w
[out / b, in / b, b]. A block has rank up to b at the price of b numbers, so rank and parameters are
set apart. No dW exists: a token costs transforms of in and out numbers and in * out / (2 b) complex
multiplications, as much again in backward for x, and as much for w; backward keeps x alone.
b divides both sides of a site. The start is U(-1, 1) sqrt(6 / (in + out)) as in PEFT, near
the base model but not at it; `start="zeros"` is at it and learns as well, dW being linear in w.
Paper: Chen et al., 2024, arXiv 2407.19342. Parameters: in out / b a site.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from plait.adapter import Delta, Method, Options, PeftCodec, Site, Traits, per_site
from plait.adapter.choices import check_choices
from plait.adapter.formats.peft_codec import any_transposed
from plait.adapter.method import PeftSite
from plait.errors import PlaitError
from plait.methods._circulant import circulant_linear
from plait.methods._ranges import check_ranges


@dataclass(frozen=True)
class C3aOptions(Options):
    block: int | None = None
    """Size b of a block, a divisor of both sides of every site. None takes
    each site's largest divisor up to 256 (PEFT's default). Larger means fewer parameters."""
    start: Literal["xavier_uniform", "kaiming_uniform", "gaussian", "zeros"] = "xavier_uniform"
    """Distribution of w at the start."""
    dropout: float = 0.0
    """Probability of dropping an input feature in training."""

    def __post_init__(self) -> None:
        check_choices(self, "c3a")
        check_ranges(self, "block")

    def size(self, site: Site) -> int:
        """b at a site."""
        if self.block is not None:
            return self.block
        common = math.gcd(*site.shape)
        return max(b for b in range(1, 257) if common % b == 0)


class C3aDelta(Delta):
    traits = Traits(zero_start=False)
    options: C3aOptions
    w: Tensor

    def build(self) -> None:
        (rows, columns), b = self.site.shape, self.options.size(self.site)
        if rows % b or columns % b:
            raise PlaitError(
                f"block={b} does not divide both sides of {self.site.path!r} ({rows} x {columns}); "
                f"{math.gcd(rows, columns)} and its divisors do."
            )
        self.traits = Traits(zero_start=self.options.start == "zeros")
        self.parameter("w", rows // b, columns // b, b)

    def reset(self) -> None:
        rows, columns = self.site.shape
        if self.options.start == "gaussian":
            self.start("w", "normal")
        elif self.options.start != "zeros":
            xavier = self.options.start == "xavier_uniform"
            self.start("w", "uniform")
            with torch.no_grad():
                self.w.mul_(math.sqrt(6 / (rows + columns) if xavier else 1 / columns))

    def dense(self) -> Tensor:
        place = torch.arange(self.w.shape[-1], device=self.w.device)
        blocks = self.w[:, :, (place - place[:, None]) % len(place)]  # [i, j, p, q]
        return blocks.transpose(1, 2).reshape(self.site.shape) / self.site.in_features

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return circulant_linear(F.dropout(x, self.dropout), self.w, 1 / self.site.in_features)


def _options(found: PeftSite) -> dict[str, Any]:
    stored = found.tensors.get("c3a_kernel")
    return {"block": found.config["block_size"] if stored is None else stored.shape[-1]}


def _config(deltas: Mapping[str, Delta]) -> dict[str, Any]:
    if any_transposed(deltas):
        raise PlaitError("PEFT's C3A acts on nn.Linear only; save in Plait's format.")
    blocks = {path: d.options.size(d.site) for path, d in deltas.items()}
    block = Counter(blocks.values()).most_common(1)[0][0]
    others = {path: b for path, b in blocks.items() if b != block}
    return {"block_size": block, "block_size_pattern": others}


METHOD = Method(
    name="c3a",
    title="C3A: circular convolution adaptation",
    paper="Chen et al., 2024, arXiv 2407.19342",
    axis="parameterisation",
    options=C3aOptions,
    delta=C3aDelta,
    count=per_site(lambda site, o: math.prod(site.shape) // o.size(site)),
    peft=PeftCodec(
        type="C3A",
        keys={"w": "c3a_kernel"},
        options=_options,
        config=_config,
        settings=("block_size", "block_size_pattern"),
    ),
    example={"block": 2, "start": "gaussian"},
)
