"""RandLoRA: a full-rank dW as a sum of frozen random products that two sets of diagonals weigh.

    dW = (alpha / r) sum_j B_j diag(lam[:, j]) A diag(gamma[j])     j = 1 .. N,  N = ceil(m / r)

m is the smaller side of W and D the larger; the sum [D, m] is transposed where in > out. A [r, m]
and B = all B_j [D, N r] are drawn once from the adapter's seed for the largest sites, divided by
their deviation, shared (a site takes leading parts) and never saved; columns j, N + j, 2 N + j, ...
of B make B_j, as in PEFT. lam [r, N] starts at 0 and gamma [N, m] at 1 / max(N, m), so that
training starts at the base model. A larger r means fewer parameters.
Where tokens are many, W + dW is formed for one product, 2 D m^2 operations a site, and backward
needs g^T x and as much again; where they are few, 2 N r (D + m) operations a token do without it.
Neither keeps bases or mixtures a site for backward, and W + dW only where it is no larger than x or
y. With T tokens a step of the linears takes 1.5 + m / T times the frozen base's.
Paper: Albert et al., 2025, arXiv 2502.00987. Parameters: N (r + m) a site.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from plait.adapter import Delta, Method, Options, SharedTensors, Site, first_input, per_site
from plait.adapter.choices import check_choices
from plait.errors import PlaitError
from plait.methods._bases import mix, mixed_linear, pull_mix
from plait.methods._folded import folded_linear, has_plain_weight
from plait.methods._randlora_peft import PEFT
from plait.methods._ranges import check_ranges


@dataclass(frozen=True)
class RandloraOptions(Options):
    rank: int = 32
    """Rank r of one product, the same at all sites (paper: 6 to 32)."""
    alpha: float | None = None
    """Numerator of the scaling alpha / r; None means 20 r (PEFT's default; its README has 2 r)."""
    bases: Literal["uniform", "sparse", "very-sparse"] = "uniform"
    """Entries of A and B: uniform, or +-1 with probability 1 / (2 s) each and 0 else, for s = 3 or
    the root of the smaller side (held densely)."""
    dropout: float = 0.0
    """Probability of dropping an input feature in training (paper: 0.05)."""

    def __post_init__(self) -> None:
        check_choices(self, "randlora")
        check_ranges(self, "rank")

    def count(self, site: Site) -> tuple[int, int]:
        """(N, m) at a site."""
        small = min(site.shape)
        return -(-small // self.rank), small


class RandloraDelta(Delta):
    options: RandloraOptions
    lam: Tensor
    gamma: Tensor

    @classmethod
    def prepare(
        cls, sites: Sequence[Site], options: RandloraOptions, shared: SharedTensors
    ) -> None:
        sides = [max((s.shape[i] for s in sites), default=1) for i in (0, 1)]
        small, large, r = min(sides), max(sides), options.rank
        s = {"uniform": 1.0, "sparse": 3.0, "very-sparse": math.sqrt(small)}[options.bases]
        for name, shape in {"A": (r, 1, small), "B": (large, -(-small // r), r)}.items():
            shared.frozen(name, shape, "uniform")
            drawn, ternary = shared[name], shared[name].sign() * (shared[name].abs() >= 1 - 1 / s)
            drawn.copy_(drawn * math.sqrt(3) if options.bases == "uniform" else ternary * s**0.5)

    def build(self) -> None:
        if self.options.rank != len(self.shared["A"]):
            raise PlaitError(
                f"rank {self.options.rank} at {self.site.path!r} is not that of the shared bases, "
                f"{len(self.shared['A'])}; overrides may not change it."
            )
        count, small = self.options.count(self.site)
        self.parameter("lam", self.options.rank, count)
        self.parameter("gamma", count, small)
        self.tall = self.site.in_features == small

    def reset(self) -> None:
        with torch.no_grad():
            self.gamma.fill_(1 / max(self.gamma.shape))

    @property
    def scaling(self) -> float:
        return 20.0 if self.options.alpha is None else self.options.alpha / self.options.rank

    def _bases(self) -> tuple[Tensor, Tensor]:
        """A [r, m] and B [D, N r], views of what all sites share."""
        count, small = self.gamma.shape
        A = self.shared["A"][:, 0, :small]
        B = self.shared["B"][: max(self.site.shape), :count].flatten(1)
        return A.to(self.gamma.dtype), B.to(self.gamma.dtype)

    def make(self, lam: Tensor, gamma: Tensor) -> Tensor:
        A, B = self._bases()
        product = B @ (mix(A, lam, gamma) * self.scaling)
        return product if self.tall else product.t()

    def pull(self, G: Tensor, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        A, B = self._bases()
        product = B.t() @ (G if self.tall else G.t())
        return pull_mix(product.mul_(self.scaling), A, lam, gamma)

    def dense(self) -> Tensor:
        return self.make(self.lam, self.gamma)

    def _few(self, x: Tensor) -> bool:
        """Whether a product with dW costs more to prepare than to do without."""
        tokens = x.numel() // max(x.shape[-1], 1)
        return tokens * sum(self.site.shape) < math.prod(self.site.shape)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x = F.dropout(x, self.dropout)
        if self._few(x):
            A, B = self._bases()
            return mixed_linear(x, A, B, self.lam, self.gamma, self.scaling, self.tall)
        return folded_linear(x, self, (self.lam, self.gamma))

    def adapt(self, *args: Any, **kwargs: Any) -> Any:
        x = first_input(args, kwargs)
        if self.dropout or self._few(x) or not has_plain_weight(self.site):
            return super().adapt(*args, **kwargs)
        parameters = (self.lam, self.gamma)
        return folded_linear(x, self, parameters, self.site.weight(), self.site.bias())


METHOD = Method(
    name="randlora",
    title="RandLoRA: full-rank parameter-efficient fine-tuning",
    paper="Albert et al., 2025, arXiv 2502.00987",
    axis="parameterisation",
    options=RandloraOptions,
    delta=RandloraDelta,
    count=per_site(lambda site, o: o.count(site)[0] * (o.rank + o.count(site)[1])),
    peft=PEFT,
)
