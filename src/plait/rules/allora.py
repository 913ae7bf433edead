"""ALLoRA: rows of dW that are still small learn faster; no dropout, no alpha / r.

    c_i = 1 / sqrt(||w_i|| + 1 / eta^2)          w_i: row i of dW = s B A, c_i = eta where w_i = 0

    dL/d(dW)_i <- c_i dL/d(dW)_i      so      B: row i * c_i        A: s B^T diag(c) g, not s B^T g

with g [out, in] the gradient of dW. Norms come from b_i (A A^T) b_i^T, so B A is never formed. An
Adam divides a factor on the gradient away, so by default it is the optimiser's movement (decoupled
decay included) that is scaled. A has no rows of dW: there the rows' relative weights c / mean(c)
enter the gradient (through a term of value zero at each site), which no scaling of an update can
imitate and which Adam keeps, and mean(c) scales the movement. SGD then takes the same step with
either `apply`. The input's gradient is left alone, so that factors of layers do not multiply.
`target` "B_rows" takes the norms of B's own rows and scales B only; "param_rows" scales every
matrix by its own rows. The paper's scale is 1: attach with alpha = rank. Rates are LoRA's, or lower
by 1 / eta. Clipping acts before the scaling. No code of the authors says which target they ran.
Paper: Huang and Balestriero, 2024, arXiv 2410.09692.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plait.adapter import Method, Pair, Rule, Run, first_input
from plait.adapter.choices import check_choices
from plait.adapter.state import find_state
from plait.errors import PlaitError
from plait.linalg.precision import working_dtype
from plait.rules._row_norms import change_norms


@dataclass
class Allora(Rule):
    eta: float = 2.0
    """The largest factor, that of a row of zeros (paper: 1 to 10, tuned for every model)."""
    target: Literal["delta_rows", "B_rows", "param_rows"] = "delta_rows"
    """Whose row norms decide: dW's, B's alone, or those of every matrix for itself."""
    apply: Literal["update", "grad"] = "update"
    """Scale the movement, or the gradient (which an Adam cancels)."""

    needs_pairs = True

    def __post_init__(self) -> None:
        check_choices(self, "allora")
        if self.eta <= 0:
            raise PlaitError(f"allora: eta must be above 0, not {self.eta}.")
        if self.target == "delta_rows" or self.apply == "grad":
            self.claims = frozenset({"gradients"})

    def check(self, run: Run) -> None:
        super().check(run)
        for pair in run.pairs():
            if getattr(pair.delta.options, "dropout", 0.0):
                raise PlaitError(
                    f"rule Allora replaces dropout, which is on at {pair.path!r}; attach with "
                    "dropout=0."
                )
            if self.target == "delta_rows" and not _is_product(pair):
                raise PlaitError(
                    f"rule Allora with target delta_rows needs an output that changes by s B A x, "
                    f"which it does not at {pair.path!r}; use target B_rows or param_rows."
                )
        if self.target == "delta_rows":
            _refuse_weights(run)

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._moved: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        self._handles = []
        for pair in run.pairs() if self.target == "delta_rows" else ():
            hook = partial(self._mix, pair)
            base = pair.delta.site.base
            self._handles.append(base.register_forward_hook(hook, with_kwargs=True))

    def factor(self, norms: Tensor) -> Tensor:
        """c of row norms."""
        return (norms + self.eta**-2).rsqrt()

    def _mix(self, pair: Pair, _: Any, args: Any, kwargs: Any, y: Tensor) -> Tensor | None:
        """Turn A's gradient s B^T g into s B^T diag(c / mean(c)) g; the output stays what it is."""
        if not (torch.is_grad_enabled() and pair.A.requires_grad):
            return None
        x = first_input(args, kwargs).detach()
        c = self.factor(change_norms(pair))
        weighted = (c / c.mean() - 1)[:, None] * pair.scale * pair.B.detach()
        dtype = x.dtype if x.is_floating_point() else y.dtype
        zero = pair.delta.site.apply_low_rank(x, pair.A.to(dtype), weighted.to(dtype))
        return y + (zero - zero.detach()).to(y.dtype)

    @torch.no_grad()
    def before_step(self) -> None:
        for p, c in (f for pair in self.run.pairs() for f in self._factors(pair)):
            if p.grad is None:
                continue
            if self.apply == "grad":
                p.grad.copy_(p.grad * c)
            else:
                self._moved.append((p, p.detach().clone(), c))

    def _factors(self, pair: Pair) -> list[tuple[nn.Parameter, Tensor]]:
        """What scales each parameter: a column for its rows, or one number."""
        if self.target == "param_rows":
            return [(p, self.factor(_own_rows(p))[..., None]) for p in (pair.A, pair.B)]
        if self.target == "B_rows":
            return [(pair.B, self.factor(_own_rows(pair.B))[..., None])]
        c = self.factor(change_norms(pair))
        return [(pair.B, c[..., None]), (pair.A, c.mean())]

    @torch.no_grad()
    def after_step(self) -> None:
        while self._moved:
            p, old, c = self._moved.pop()
            start = old.to(working_dtype(old.dtype))
            p.copy_(start + c * (p - start))

    def finish(self) -> None:
        for handle in self._handles:
            handle.remove()


def _own_rows(p: Tensor) -> Tensor:
    return torch.linalg.vector_norm(p.detach(), dim=-1, dtype=working_dtype(p.dtype))


def _is_product(pair: Pair) -> bool:
    return pair.delta.traits.low_rank and pair.delta.site.kind != "parameter"


def _refuse_weights(run: Run) -> None:
    state = find_state(run.model)
    for adapter in run.adapters:
        if state is not None and state.active[adapter.name] != 1.0:
            raise PlaitError(
                f"rule Allora trains adapter {adapter.name!r} at weight 1, and it is active at "
                "another; activate it at 1, or use target B_rows."
            )


METHOD = Method(
    name="allora",
    title="ALLoRA: an adaptive learning rate for every row of the change",
    paper="Huang and Balestriero, 2024, arXiv 2410.09692",
    axis="rule",
    rule=Allora,
)
