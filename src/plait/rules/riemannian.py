"""Riemannian preconditioning: LoRA's gradients in the metric of the product, not of its factors.

    GA' = (B^T B + delta I)^-1 GA          GB' = GB (A A^T + delta I)^-1          [r x r] each

GA = s B^T g shrinks where B is small, and GB where A is; the inverses undo that. As delta goes to
0, an SGD step moves dW by -lr s^2 (P_B g + g P_A) to first order, P the projections on B's columns
and A's rows and g the full gradient, and exactly alike for (B R, R^-1 A) with any invertible R: how
badly scaled or conditioned the pair is no longer matters. With the default optimiser underneath the
preconditioned gradients enter AdamW's moments ("scaled AdamW"), with torch.optim.SGD it is scaled
gradient descent; AdamW looks at single entries, so that its steps do depend on R.
A large delta gives plain gradients over delta. Clipping acts before this, on the plain gradients.
Paper: Zhang and Pilanci, 2024, arXiv 2402.02347.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plait.adapter import Method, Rule
from plait.errors import PlaitError
from plait.linalg import damped_inverse
from plait.rules._pair_batches import by_shape, named_pairs, stacked, write_back


def preconditioned(
    GA: Tensor | None, GB: Tensor | None, A: Tensor, B: Tensor, delta: float
) -> tuple[Tensor | None, Tensor | None]:
    """GA' [..., r, in] and GB' [..., out, r]; None, of a frozen factor, stays None.

    With delta 0, a factor of zeros gives the other one a step of 0 (its pseudo-inverse).
    """
    eye = torch.eye(A.shape[-2], dtype=A.dtype, device=A.device)
    inverse = lambda gram: damped_inverse(gram + delta * eye, 0.0)  # noqa: E731
    return (
        None if GA is None else inverse(B.mT @ B) @ GA,
        None if GB is None else GB @ inverse(A @ A.mT),
    )


@dataclass
class Riemannian(Rule):
    delta: float = 1e-6
    """Added to B^T B and A A^T as it stands (the paper's code; PEFT's default is 1e-2). Directions
    below about its square root count as noise, which matters right after a start at B = 0."""

    needs_pairs = True
    claims = frozenset({"gradients"})

    def __post_init__(self) -> None:
        if self.delta < 0:
            raise PlaitError(f"riemannian: delta must be at least 0, not {self.delta}.")

    @torch.no_grad()
    def before_step(self) -> None:
        for batch in by_shape(named_pairs(self.run), None):
            pairs = [pair for _, pair in batch]
            A, B, GA, GB, _ = stacked(pairs)
            write_back(pairs, *preconditioned(GA, GB, A, B, self.delta))


METHOD = Method(
    name="riemannian",
    title="Riemannian preconditioning of LoRA's gradients",
    paper="Zhang and Pilanci, 2024, arXiv 2402.02347",
    axis="rule",
    rule=Riemannian,
)
