"""Hydra: one low-rank branch on a layer's input and one on its output, both linear, both foldable.

    x ──┬──► W, b ──► f ──┬───────────────────────────► + ──► y
        │                 └──► A_s (r x out) + a_s ──► B_s (out x r) + c_s ──► * s ──┤
        └────────────────────► A_p (r x in)  + a_p ──► B_p (out x r) + c_p ──► * s ──┘

The parallel branch learns new features, the sequential one recombines those that W already gives:
dW = s (B_p A_p + B_s A_s W), db = s (B_p a_p + c_p + B_s (A_s b + a_s) + c_s). Dropout stands
between down and up. Down starts at Xavier's uniform distribution, everything else at zero.
Paper: Kim et al., 2023, arXiv 2309.06922. Parameters: r (in + out) + 2 r out a site, and
2 (r + out) for the biases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from plait.adapter import Delta, Method, Options, Site, Traits, per_site
from plait.errors import PlaitError
from plait.linalg import LowRank

BRANCHES = {"both": ("p", "s"), "parallel": ("p",), "sequential": ("s",)}
STARTS = {"xavier": "xavier_uniform", "normal": "normal", "kaiming": "kaiming_uniform"}


@dataclass(frozen=True)
class HydraOptions(Options):
    rank: int = 8
    """Rank r of each branch (paper: 2 to 8); half a LoRA's for about as many parameters."""
    branches: Literal["both", "parallel", "sequential"] = "both"
    """Which branches there are; "parallel" is LoRA with biases."""
    scale: float = 1.0
    """Factor s on both branches (paper: 0.1 to 10, by data set)."""
    bias: bool = True
    """Give every projection a bias; the site then gets a bias even where the base has none."""
    dropout: float = 0.0
    """Probability of dropping one of a branch's r hidden features in training."""
    start: Literal["xavier", "normal", "kaiming"] = "xavier"
    """Distribution of the down projections: Xavier's uniform, N(0, 0.02^2) or Kaiming's uniform."""

    def __post_init__(self) -> None:
        if self.branches not in BRANCHES:
            raise PlaitError(f"branches must be one of {list(BRANCHES)}, not {self.branches!r}.")
        if self.start not in STARTS:
            raise PlaitError(f"start must be one of {list(STARTS)}, not {self.start!r}.")
        if self.rank < 1:
            raise PlaitError(f"rank must be at least 1, not {self.rank}.")
        if not 0 <= self.dropout < 1:
            raise PlaitError(f"dropout must lie in [0, 1), not {self.dropout}.")


class HydraDelta(Delta):
    options: HydraOptions

    def build(self) -> None:
        o, rows = self.options, self.site.out_features
        sequential = "s" in self.branches
        # Even without biases of its own the sequential branch carries the base's bias along.
        self.traits = Traits(
            depends_on_base=sequential, reads_output=sequential, changes_bias=o.bias or sequential
        )
        for branch in self.branches:
            self.parameter(f"A_{branch}", o.rank, rows if branch == "s" else self.site.in_features)
            self.parameter(f"B_{branch}", rows, o.rank)
            if o.bias:
                self.parameter(f"a_{branch}", o.rank)
                self.parameter(f"c_{branch}", rows)

    def reset(self) -> None:
        for branch in self.branches:
            self.start(f"A_{branch}", STARTS[self.options.start])
            if self.options.start == "normal":
                self.get_parameter(f"A_{branch}").mul_(0.02)

    @property
    def branches(self) -> tuple[str, ...]:
        return BRANCHES[self.options.branches]

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        seen = {"p": x, "s": self.site.forward(x) if y is None else y}
        hidden = torch.cat([self._down(b, seen[b]) for b in self.branches], -1)
        hidden = F.dropout(hidden, self.options.dropout, self.training) * self.options.scale
        change = F.linear(hidden, self._up().to(hidden.dtype))
        if self.options.bias:
            change = change + (self.options.scale * self._last_bias()).to(change.dtype)
        return change

    def _down(self, branch: str, x: Tensor) -> Tensor:
        bias = self._parameters.get(f"a_{branch}")
        A = self.get_parameter(f"A_{branch}").to(x.dtype)
        return F.linear(x, A, None if bias is None else bias.to(x.dtype))

    def _up(self) -> Tensor:
        """The up projections side by side, [out, r] or [out, 2 r]."""
        return torch.cat([self.get_parameter(f"B_{b}") for b in self.branches], 1)

    def _last_bias(self) -> Tensor:
        return sum((self.get_parameter(f"c_{b}") for b in self.branches), start=torch.zeros(()))

    def factors(self) -> LowRank:
        A: list[Tensor] = [self.get_parameter(f"A_{b}") for b in self.branches]
        if "s" in self.branches:
            A[-1] = A[-1] @ self.base_weight()
        return LowRank(B=self._up(), A=torch.cat(A), scale=self.options.scale)

    def bias(self) -> Tensor | None:
        if not self.traits.changes_bias:
            return None
        rank, B = self.options.rank, self._up()
        hidden = B.new_zeros(len(self.branches), rank)
        if self.options.bias:
            hidden = torch.stack([self.get_parameter(f"a_{b}") for b in self.branches])
        base = self.site.bias() if "s" in self.branches else None
        if base is not None:
            carried = self.get_parameter("A_s") @ base.detach().to(B.dtype)
            hidden = torch.cat([hidden[:-1], (hidden[-1] + carried).unsqueeze(0)])
        change = B @ hidden.flatten()
        if self.options.bias:
            change = change + self._last_bias()
        return self.options.scale * change


def _count(site: Site, o: HydraOptions) -> int:
    total = 0
    for branch in BRANCHES[o.branches]:
        down = site.out_features if branch == "s" else site.in_features
        total += o.rank * (down + site.out_features)
        total += (o.rank + site.out_features) if o.bias else 0
    return total


METHOD = Method(
    name="hydra",
    title="Hydra: multi-head low-rank adaptation",
    paper="Kim et al., 2023, arXiv 2309.06922",
    axis="parameterisation",
    options=HydraOptions,
    delta=HydraDelta,
    count=per_site(_count),
)
