"""LoRA-RITE: an Adam for the product B A that does not see how it is split into factors.

For B, with A^T = U T (U [in, r] orthonormal, T [r, r]); for A alike, with B = U T:

    Gbar = GB T^-1 = s g U                 the unmagnified gradient [out, r], in coordinates of U
    V <- b2 V + (1 - b2) Gbar^T Gbar / out              [r, r]
    M <- b1 M + (1 - b1) Gbar (V^(1/2) + eps)^-1        momentum behind the preconditioner
    B <- B - lr M T^-T                                  dW moves by -lr s M U^T

U turns with the other factor, so M and V are first turned into the coordinates at hand, M P^T and
P V P^T with P = U_new^T U_old. Any (B R, R^-1 A) takes the same path of dW, where Adam's depends on
R. A singular T has its pseudo-inverse: from B = 0, the first step moves B only. Steps have entries
near 1 as Adam's have. State: U, M and V, together what Adam keeps and 2 r^2 numbers a site.
Everything that is in no pair takes Adam's step. Clipping outside acts on the plain gradients.
Paper: Yen et al., 2024, arXiv 2410.20625.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.adapter import Method, Pair, Rule, Run
from plait.adapter.rule import OptimizerFactory
from plait.errors import PlaitError
from plait.rules._matrix_moments import MatrixMoments, Side
from plait.rules._moments import AdamMoments
from plait.rules._pair_batches import by_shape, named_pairs, stacked, unpaired


@dataclass
class LoraRite(Rule):
    betas: tuple[float, float] = (0.9, 0.999)
    """Of M and V; both are corrected so that early steps need no other correction."""
    eps: float = 1e-6
    """Added to V's root."""
    clip: float = 1.0
    """Greatest norm of all unmagnified gradients together; 0 does not clip."""
    skip: float = 1.0
    """A factor whose unmagnified gradient has a greater root mean square counts as 0; 0 never."""
    escape: bool = False
    """Add to V what its turns have lost (the paper's escaped mass; off in its code)."""

    needs_pairs = True
    claims = frozenset({"gradients"})
    keeps_shapes = True

    def __post_init__(self) -> None:
        if not all(0 <= b < 1 for b in self.betas):
            raise PlaitError(f"lora-rite: betas lie in [0, 1), unlike {self.betas}.")
        if self.eps <= 0 or self.clip < 0 or self.skip < 0:
            raise PlaitError("lora-rite: eps must be above 0, clip and skip at least 0.")

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._pairs = MatrixMoments(self.betas, self.eps, self.escape)
        self._rest = AdamMoments(self.betas, 1e-8)

    def optimizer(self) -> OptimizerFactory:
        # SGD's L2 term without momentum is decoupled decay, so weight_decay means AdamW's.
        return torch.optim.SGD

    @torch.no_grad()
    def before_step(self) -> None:
        self._rest.count += 1
        pairs = list(named_pairs(self.run))
        sides = [side for batch in by_shape(pairs, None) for side in self._sides(batch)]
        share = self._share(sides)
        for side in sides:
            gradient = side.gradient if share is None else side.gradient * share.to(side.gradient)
            direction = self._pairs.direction(side, gradient) @ side.inverse.mT
            side.write(direction, flat=side.keys[0].endswith("/A"))
        for name, p, gradient in unpaired(self.run, pairs):
            p.grad = self._rest.direction(name, gradient).to(p.dtype)

    def _sides(self, batch: list[tuple[str, Pair]]) -> Iterator[Side]:
        A, B, GA, GB, _ = stacked([pair for _, pair in batch])
        tall = {"A": (None if GA is None else GA.mT, B), "B": (GB, A.mT)}
        for factor, (gradient, other) in tall.items():
            if gradient is None:
                continue
            basis, triangle = torch.linalg.qr(other)
            inverse = torch.linalg.pinv(triangle)
            gradient = gradient @ inverse
            if self.skip:
                rms = gradient.square().mean((-2, -1), keepdim=True).sqrt()
                gradient = torch.where(rms > self.skip, 0, gradient)
            keys = [f"{name}/{factor}" for name, _ in batch]
            yield Side(keys, [getattr(p, factor) for _, p in batch], gradient, basis, inverse)

    def _share(self, sides: list[Side]) -> Tensor | None:
        """What clipping leaves of the gradients, a number that stays on its device."""
        if not (self.clip and sides):
            return None
        home = sides[0].gradient.device
        squares = torch.stack([side.gradient.square().sum().to(home) for side in sides])
        return (self.clip / squares.sum().sqrt()).clamp_max(1)

    def state_dict(self) -> dict[str, Any]:
        return {"pairs": dict(self._pairs.kept), "rest": self._rest.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Tensors come to their gradient's device when they are used.
        self._pairs.kept = {key: dict(one) for key, one in state["pairs"].items()}
        self._rest.load_state_dict(state["rest"])


METHOD = Method(
    name="lora-rite",
    title="LoRA-RITE: matrix Adam that is invariant to the split into factors",
    paper="Yen et al., 2024, arXiv 2410.20625",
    axis="rule",
    rule=LoraRite,
)
