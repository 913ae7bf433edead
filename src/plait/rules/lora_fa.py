"""LoRA-FA: A stays as it was drawn, and B learns with the best gradient that a fixed A allows.

    A [r, in] frozen          g_B = (1/s^2) GB (A A^T)^-1          GB = s g A^T  (autograd)

Of all steps through B alone, g_B moves dW closest to the full gradient g [out, in]: s g_B A is g
projected on A's row space, and dW's path is the same for any basis of that space.
`correct=False` leaves GB as it is, which is the paper's plain form; both are the same up to one
factor where A has orthonormal rows. What backward keeps of a site falls from x [tokens, in] to
A x [tokens, r]. On embeddings, whose table A starts at 0, B is the frozen factor and A learns.
Gradients change by about 1/s^2 and A's scale: a learning rate found without the correction does
not carry over. Clipping acts before this, on the plain gradients.
Paper: Zhang et al., 2023, arXiv 2308.03303. Trains r out of r (in + out) parameters a site.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from plait.adapter import Method, Pair, Rule, Run
from plait.errors import PlaitError
from plait.rules._pair_batches import by_shape, named_pairs, stacked, write_back
from plait.rules.lora_pro import adjusted_gradients


@dataclass
class LoraFa(Rule):
    correct: bool = True
    """Replace B's gradient by the one whose step in dW is closest to full training's."""
    damping: float = 1e-8
    """Added to A A^T, relative to its greatest eigenvalue (never below the dtype's epsilon)."""

    needs_pairs = True
    claims = frozenset({"gradients"})

    def __post_init__(self) -> None:
        if self.damping < 0:
            raise PlaitError(f"lora-fa: damping must be at least 0, not {self.damping}.")

    def setup(self, run: Run) -> None:
        super().setup(run)
        # Those that were frozen before stay so when the run is over.
        self._frozen = [p for p in map(fixed_factor, run.pairs()) if p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    @torch.no_grad()
    def before_step(self) -> None:
        if not self.correct:
            return
        for batch in by_shape(named_pairs(self.run), None):
            pairs = [pair for _, pair in batch]
            A, B, GA, GB, scale = stacked(pairs)
            write_back(pairs, *adjusted_gradients(GA, GB, A, B, scale, damping=self.damping))

    def finish(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)


def fixed_factor(pair: Pair) -> nn.Parameter:
    """The random factor of a pair at its start: A, or B where A is an embedding's table."""
    return pair.B if pair.delta.site.kind == "embedding" else pair.A


METHOD = Method(
    name="lora-fa",
    title="LoRA-FA: A frozen, and the best gradient for B alone",
    paper="Zhang et al., 2023, arXiv 2308.03303",
    axis="rule",
    rule=LoraFa,
)
