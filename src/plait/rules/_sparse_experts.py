"""A bottleneck whose projections are cut into experts, each a parameter of its own.

    U (d x r), E = 3      U0 . U2       an expert's forward sees its own entries,
                          . U1 U2       and the start values elsewhere;
                          U0 U1 .       all experts together are the merged adapter

To the optimiser every expert is another parameter: one that was not drawn has no gradient, so
neither momentum nor decay nor step counts of its own move, whatever the optimiser is.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from plait.adapter import Delta, Options, Site
from plait.adapter.choices import check_choices
from plait.errors import PlaitError
from plait.methods._blocks import Placement, residual_traits

EPS = 1e-6
SPLIT = {"down": ("U",), "up": ("D",), "none": ("D", "U")}
"""Which projections are cut, by the option `share`."""


@dataclass(frozen=True)
class MosaOptions(Options):
    rank: int = 64
    """Width r of the bottleneck (paper: 64)."""
    experts: int = 4
    """Parts E into which a projection is cut (paper: 4); 1 is the plain adapter."""
    share: Literal["down", "up", "none"] = "down"
    """The projection that stays whole and trains in every step, or none (paper: down)."""
    split: Literal["tensor", "row", "column"] = "tensor"
    """Deal out entries over the whole matrix, or evenly within each of its rows or columns."""
    scale: float = 0.1
    """Factor on the bottleneck's output (paper: 0.1)."""
    dropout: float = 0.1
    """Probability of dropping a hidden feature in training (paper: 0.1)."""
    norm: bool = True
    """A layer norm of the adapter's own before the bottleneck (paper: yes)."""
    placement: Placement = "parallel"
    """Read the sublayer's input (AdaptFormer, the paper's choice) or its output (Pfeiffer)."""

    def __post_init__(self) -> None:
        check_choices(self, "mosa")
        if min(self.rank, self.experts) < 1:
            raise PlaitError("mosa: rank and experts must be at least 1.")


class MosaDelta(Delta):
    kinds = frozenset({"module"})
    traits = residual_traits("parallel")
    options: MosaOptions
    b_d: Tensor
    b_u: Tensor

    def build(self) -> None:
        self.traits = residual_traits(self.options.placement)
        d, r = self.site.out_features, self.options.rank
        self.active: dict[str, int] = {}
        """{projection: expert} of this training step; empty: all experts, merged."""
        self.ends: dict[str, list[tuple[int, int]]] = {}
        for name, shape in (("D", (r, d)), ("U", (d, r))):
            if name in SPLIT[self.options.share]:
                self._cut(name, shape)
            else:
                self.parameter(name, *shape)
        self.parameter("b_d", r)
        self.parameter("b_u", d)
        if self.options.norm:
            self.parameter("norm_scale", d)
            self.parameter("norm_shift", d)

    def _cut(self, name: str, shape: tuple[int, int]) -> None:
        part = deal(shape, self.options.experts, self.options.split, self.generator("split", name))
        sizes = part.flatten().bincount(minlength=self.options.experts)
        if not sizes.all():
            raise PlaitError(
                f"mosa at {self.site.path!r}: {self.options.experts} experts are too many for "
                f"{list(shape)} by {self.options.split}; lower experts."
            )
        self.seeded_value(f"order_{name}", part.flatten().argsort(stable=True))
        if name == "D":
            self.seeded("D_start", "kaiming_uniform", *shape)
        else:
            self.seeded_value("U_start", torch.zeros(shape, dtype=self.dtype))
        self.ends[name] = list(pairwise([0, *sizes.cumsum(0).tolist()]))
        for expert, size in enumerate(sizes.tolist()):
            self.parameter(f"{name}{expert}", size)

    def reset(self) -> None:
        if "D" not in self.ends:
            self.start("D", "kaiming_uniform")
        for name, ends in self.ends.items():
            start = self.get_buffer(f"{name}_start").flatten()
            for expert in range(len(ends)):
                positions = self.positions(name, expert)
                self.get_parameter(f"{name}{expert}").copy_(start[positions])
        if self.options.norm:
            torch.nn.init.ones_(self.get_parameter("norm_scale"))

    def positions(self, name: str, expert: int) -> Tensor:
        """The entries of one expert, as positions in the flattened projection."""
        return self.get_buffer(f"order_{name}")[slice(*self.ends[name][expert])]

    def draw(self, g: torch.Generator) -> None:
        """Choose this step's expert of every cut projection, each by itself."""
        experts = self.options.experts
        self.active = {n: int(torch.randint(experts, (), generator=g)) for n in self.ends}

    def projection(self, name: str) -> Tensor:
        """D [r, d] or U [d, r]: merged, or in training as the drawn expert sees it."""
        if name not in self.ends:
            return self.get_parameter(name)
        start, expert = self.get_buffer(f"{name}_start"), self.active.get(name)
        positions = self.get_buffer(f"order_{name}")
        values: list[Tensor] = [
            self.get_parameter(f"{name}{i}") for i in range(len(self.ends[name]))
        ]
        if expert is not None and self.training:
            positions, values = self.positions(name, expert), [values[expert]]
        return start.flatten().index_copy(0, positions, torch.cat(values)).view(start.shape)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """scale (U gelu(D norm(x) + b_d) + b_u) for x [..., d]."""
        if self.options.norm:
            scale, shift = (self.get_parameter(f"norm_{n}").to(x.dtype) for n in ("scale", "shift"))
            x = F.layer_norm(x, x.shape[-1:], scale, shift, EPS)
        hidden = F.gelu(F.linear(x, self.projection("D").to(x.dtype), self.b_d.to(x.dtype)))
        hidden = F.dropout(hidden, self.dropout) if self.dropout else hidden
        U, b_u = self.options.scale * self.projection("U"), self.options.scale * self.b_u
        return F.linear(hidden, U.to(x.dtype), b_u.to(x.dtype))


def deal(shape: tuple[int, int], experts: int, by: str, g: torch.Generator) -> Tensor:
    """To which expert each entry belongs: random ranks, cut into equal bands."""
    scores = torch.rand(shape, generator=g)
    if by == "tensor":
        scores = scores.flatten()
    axis = 0 if by == "column" else -1
    ranks = scores.argsort(axis).argsort(axis)
    return (ranks * experts // scores.shape[axis]).view(shape)


def mosa_count(site: Site, o: MosaOptions) -> int:
    d, r = site.out_features, o.rank
    return 2 * r * d + r + d + (2 * d if o.norm else 0)
