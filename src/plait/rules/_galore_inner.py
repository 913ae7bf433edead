"""What turns a gradient into a direction, with its state in a dict of tensors and numbers.

`InnerStep` is the seam: a low-rank optimiser runs one on projected gradients, and one on those of
weights that it does not project. Directions are what is subtracted at a learning rate of 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from plait.quantization import BlockQuantizer
from plait.rules._subspace import Turn

State = dict[str, Any]
Inner = Literal["adamw", "adamw-8bit", "adafactor"]


class InnerStep(Protocol):
    def direction(self, state: State, gradient: Tensor) -> Tensor:
        """The direction for this gradient; the state is brought up to date."""
        ...

    def turn(self, state: State, turn: Turn) -> None:
        """Carry the state over to other coordinates."""
        ...


@dataclass(frozen=True)
class Adam:
    """Adam with bias correction, as torch.optim.AdamW without its decay."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def direction(self, state: State, gradient: Tensor) -> Tensor:
        first, second = self._load(state) if state else (torch.zeros_like(gradient) for _ in "mv")
        b1, b2 = self.betas
        count = state["count"] = state.get("count", 0) + 1
        first.lerp_(gradient, 1 - b1)
        second.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        self._keep(state, first, second)
        root = (second / (1 - b2**count)).sqrt_().add_(self.eps)
        return first / (1 - b1**count) / root

    def turn(self, state: State, turn: Turn) -> None:
        first, second = self._load(state)
        self._keep(state, turn.first(first), turn.second(second))

    def _load(self, state: State) -> tuple[Tensor, Tensor]:
        return state["exp_avg"], state["exp_avg_sq"]

    def _keep(self, state: State, first: Tensor, second: Tensor) -> None:
        state["exp_avg"], state["exp_avg_sq"] = first, second


@dataclass(frozen=True)
class Adam8bit(Adam):
    """The same with moments of 8 bits an entry between steps, in blocks with a scale each.

    Only the moments of the parameter at hand are ever decoded. Tensors of fewer than `least`
    entries stay as they are (small ones save nothing and, as norms and biases, matter most).
    """

    block: int = 256
    least: int = 4096
    first_book: BlockQuantizer = field(init=False)
    second_book: BlockQuantizer = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "first_book", BlockQuantizer(8, self.block, "dynamic"))
        object.__setattr__(self, "second_book", BlockQuantizer(8, self.block, "dynamic-unsigned"))

    def _load(self, state: State) -> tuple[Tensor, Tensor]:
        if "exp_avg_scale" not in state:
            return super()._load(state)
        first = self.first_book.decode(state["exp_avg"], state["exp_avg_scale"])
        return first, self.second_book.decode(state["exp_avg_sq"], state["exp_avg_sq_scale"])

    def _keep(self, state: State, first: Tensor, second: Tensor) -> None:
        if first.numel() < self.least:
            return super()._keep(state, first, second)
        state["exp_avg"], state["exp_avg_scale"] = self.first_book.encode(first)
        state["exp_avg_sq"], state["exp_avg_sq_scale"] = self.second_book.encode(second)


@dataclass(frozen=True)
class Adafactor:
    """Adafactor without momentum: of a matrix's squared gradients, means of rows and columns only.

    The rate comes from outside and is relative to nothing; a direction's root mean square is cut
    to 1. Shazeer and Stern, 2018, arXiv 1804.04235.
    """

    decay: float = 0.8
    eps: float = 1e-30

    keys = ("count", "rows", "columns")

    def direction(self, state: State, gradient: Tensor) -> Tensor:
        count = state["count"] = state.get("count", 0) + 1
        square, share = gradient.square() + self.eps, count**-self.decay
        for key, axis in (("rows", -1), ("columns", -2)):
            mean = square.mean(axis)
            state[key] = state[key].lerp(mean, share) if key in state else mean
        rows, columns = state["rows"], state["columns"]
        second = rows.unsqueeze(-1) * columns.unsqueeze(-2)
        step = gradient * (second / rows.mean(-1)[..., None, None]).rsqrt()
        return step / step.square().mean().sqrt().clamp_min(1)

    def turn(self, state: State, turn: Turn) -> None:
        # A mean over a side that is not turned does not see the turn.
        squared, zero = turn.squared(), self.eps
        rows, columns = state["rows"].unsqueeze(-1), state["columns"].unsqueeze(-2)
        state["rows"] = Turn(squared.left, None).first(rows).squeeze(-1).clamp_min(zero)
        state["columns"] = Turn(None, squared.right).first(columns).squeeze(-2).clamp_min(zero)


def make_inner(inner: Inner, betas: tuple[float, float], eps: float) -> InnerStep:
    if inner == "adafactor":
        return Adafactor()
    return (Adam8bit if inner == "adamw-8bit" else Adam)(betas, eps)
