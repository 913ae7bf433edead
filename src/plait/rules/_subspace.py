"""The subspace in which a low-rank optimiser keeps its state: its bases, and the way in and out.

    left  P [m, r]   R = P^T G                     back:  P N
    right Q [r, n]   R = G Q^T                     back:  N Q
    both             R = P^T G Q^T [r, r]          back:  P N Q

A basis that is None is the identity: that side is not projected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from plait.linalg import gram_directions, mapped_directions, randomized_svd
from plait.linalg.precision import accumulator_dtype, require_finite

Side = Literal["std", "reverse_std", "left", "right", "full"]
Svd = Literal["randomised", "full"]


@dataclass
class Subspace:
    """Orthonormal columns `left` [m, r] and rows `right` [r, n], either of them None."""

    left: Tensor | None = None
    right: Tensor | None = None

    def project(self, gradient: Tensor) -> Tensor:
        if self.left is not None:
            gradient = self.left.mT @ gradient
        return gradient if self.right is None else gradient @ self.right.mT

    def back(self, step: Tensor) -> Tensor:
        if self.left is not None:
            step = self.left @ step
        return step if self.right is None else step @ self.right

    def turn_from(self, old: Subspace) -> Turn:
        """How what was kept in `old`'s coordinates reads in these."""
        left = None if self.left is None or old.left is None else self.left.mT @ old.left
        right = None if self.right is None or old.right is None else old.right @ self.right.mT
        return Turn(left, right)


@dataclass
class Turn:
    """A change of coordinates, R -> left R right; None is the identity."""

    left: Tensor | None
    right: Tensor | None

    def first(self, moment: Tensor) -> Tensor:
        """A mean of gradients in the new coordinates."""
        moment = moment if self.left is None else self.left @ moment
        return moment if self.right is None else moment @ self.right

    def second(self, moment: Tensor) -> Tensor:
        """A mean of squared gradients, their entries taken as uncorrelated."""
        return self.squared().first(moment)

    def squared(self) -> Turn:
        square = lambda t: None if t is None else t.square()  # noqa: E731
        return Turn(square(self.left), square(self.right))


def projected_sides(shape: torch.Size, side: Side) -> tuple[bool, bool]:
    """Whether the rows (by P) and the columns (by Q) of a weight are projected.

    "std" projects the shorter side, "reverse_std" the longer one, of a square weight the columns
    and the rows respectively.
    """
    tall = shape[-2] >= shape[-1]
    if side == "full":
        return True, True
    left = {"std": not tall, "reverse_std": tall, "left": True, "right": False}[side]
    return left, not left


def leading_subspace(
    gradient: Tensor,
    rank: int,
    side: Side = "std",
    svd: Svd = "randomised",
    generator: torch.Generator | None = None,
) -> Subspace:
    """The span of the gradient's leading `rank` singular vectors, on the sides that are asked for.

    A side no longer than `rank` is left as it is: a basis of all of it would save nothing. "full"
    decomposes the Gram matrix of the shorter side in float64, "randomised" sketches. Raises
    ValueError for NaN or infinity.
    """
    left, right = projected_sides(gradient.shape, side)
    left, right = left and gradient.shape[-2] > rank, right and gradient.shape[-1] > rank
    if not (left or right):
        return Subspace()
    least = min(rank, *gradient.shape[-2:])
    if svd == "randomised":
        U, _, Vh = randomized_svd(gradient, least, generator=generator)
        columns, rows = U, Vh
    else:
        require_finite(gradient, "the gradient", "SVD")
        wide = gradient.to(accumulator_dtype(gradient.device))
        found, _, flat = gram_directions(wide)
        found = found[..., :least, :]
        other = mapped_directions(wide, found, flat) if (right if flat else left) else found
        columns, rows = (found.mT, other) if flat else (other.mT, found)
    # A copy, since a slice would keep the whole decomposition in memory.
    keep = lambda basis: basis.to(gradient.dtype, copy=True).contiguous()  # noqa: E731
    return Subspace(keep(columns) if left else None, keep(rows) if right else None)
