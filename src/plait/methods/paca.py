"""PaCA: train r input columns of W in place; no branch beside the base product.

    x ──► W with W[:, I] <- W[:, I] + scaling * P ──► y        (one product)
    x[..., I] ─────────────────────────────────────► dP        (all that backward keeps)

dW[:, I] = scaling * P, zero elsewhere, with I a set of r input features drawn from the seed. P
[out, r] is the CHANGE of the columns, zero at the start: its gradient is that of the paper's
absolute columns, weight decay pulls to the base and not to zero, and a file needs no base.

While the adapter is active, W's columns hold the trained values, and they are written anew in the
first forward after P has moved; so it must be active alone. Afterwards the old columns are put back
bit for bit. A weight that is tied to another module is edited for both.
Paper: Woo et al., 2025, arXiv 2503.01905. Parameters: r out a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from plait.adapter import Delta, Method, Options, Traits, first_input, per_site
from plait.errors import PlaitError
from plait.kernels._gate import plain_path
from plait.linalg import LowRank
from plait.methods._columns import column_linear


@dataclass(frozen=True)
class PacaOptions(Options):
    rank: int = 8
    """How many columns of W are trained; 8 costs what LoRA of rank 4 to 8 does."""
    alpha: float | None = None
    """Numerator of the scaling alpha / r of P; None means r, a scaling of 1 (paper's code: 4)."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise PlaitError(f"rank must be at least 1, not {self.rank}.")

    @property
    def scaling(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


class PacaDelta(Delta):
    traits = Traits(edits_base=True)
    options: PacaOptions
    P: Tensor
    columns: Tensor
    original: Tensor | None  # W[:, I] as the base has it, while W holds the trained columns

    def build(self) -> None:
        inputs, rank = self.site.in_features, self.options.rank
        if rank > inputs:
            raise PlaitError(f"site {self.site.path!r} has {inputs} columns, fewer than {rank=}.")
        self.parameter("P", self.site.out_features, rank)
        order = torch.randperm(inputs, generator=self.generator("columns"))
        self.seeded_value("columns", order[:rank].sort().values)
        self.register_buffer("original", None, persistent=False)
        self._mark: tuple[int, ...] | None = None  # versions of P and W when they last agreed
        self._had_gradient = False

    def activated(self) -> None:
        if self.original is not None:
            return
        weight = self.site.weight()
        if not weight.is_floating_point() or tuple(weight.shape) != tuple(self.site.shape):
            raise PlaitError(
                f"the weight of {self.site.path!r} is quantised or sharded, and PaCA trains "
                "columns of W in place; use a plain base."
            )
        self.original = weight.detach().index_select(1, self.columns)
        self._mark = None
        self._write()

    def deactivated(self) -> None:
        if self.original is not None:
            with torch.no_grad():
                self.site.weight().index_copy_(1, self.columns, self.original)
            self.original = None

    def _write(self) -> Tensor:
        """W, after its columns were brought up to P (also when the base was loaded over them)."""
        weight = self.site.weight()
        with torch.no_grad():
            if self._mark != self._versions(weight):
                weight.index_copy_(1, self.columns, self._target())
            elif self._had_gradient:
                # torch's fused optimisers move P without counting a version. Mostly nothing has
                # moved, and then `.data` spares W a new version: an older graph may still need it.
                weight.data.index_copy_(1, self.columns, self._target())
        self._mark, self._had_gradient = self._versions(weight), False
        return weight

    def _note_gradient(self) -> None:
        self._had_gradient = True

    def _versions(self, weight: Tensor) -> tuple[int, ...]:
        counts = [-1 if t.is_inference() else t._version for t in (self.P, weight)]
        return (*counts, self.P.data_ptr(), weight.data_ptr())

    def _target(self) -> Tensor:
        """The columns that W should hold, in W's dtype."""
        assert self.original is not None
        wide = self.original.to(torch.promote_types(self.original.dtype, self.P.dtype))
        return (wide + self.options.scaling * self.P).to(self.original.dtype)

    def adapt(self, *args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = first_input(args, kwargs)
        if self.original is None:  # W has been lent back to the base for a while
            return super().adapt(x)
        weight, bias = self.site.weight(), self.site.bias()
        if plain_path(x, self.P, weight) or weight.requires_grad:
            # Right whether or not W is up to date, so that compilers need no side effect.
            missing = self._target() - weight.detach().index_select(1, self.columns)
            picked = x.index_select(-1, self.columns)
            self._note_gradient()
            return F.linear(x, weight, bias) + F.linear(picked, missing)
        live, scaling = self._write(), self.options.scaling
        return column_linear(x, self.P, live, bias, self.columns, scaling, self._note_gradient)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        change = self.options.scaling * self.P
        return F.linear(x.index_select(-1, self.columns), change.to(x.dtype))

    def factors(self) -> LowRank:
        A = F.one_hot(self.columns, self.site.in_features).to(self.P.dtype)
        return LowRank(B=self.P, A=A, scale=self.options.scaling)

    def dense(self) -> Tensor:
        zero = self.P.new_zeros(tuple(self.site.shape))
        return zero.index_copy(1, self.columns, self.options.scaling * self.P)

    def seeded_tensors(self) -> dict[str, Tensor]:
        return {"columns": self.columns}  # the base's own columns are no draw of the seed


METHOD = Method(
    name="paca",
    title="PaCA: partial connection adaptation",
    paper="Woo et al., 2025, arXiv 2503.01905",
    axis="parameterisation",
    options=PacaOptions,
    delta=PacaDelta,
    count=per_site(lambda site, o: o.rank * site.out_features),
)
