"""LoRA-Pro: adjust the gradients of A and B so that their joint step best copies full training's.

    GA = s B^T g,  GB = s g A^T  (autograd)          equivalent gradient  E = s g_B A + s B g_A

Of all (g_A, g_B) these bring E closest to the full gradient g [out, in], which is never formed:

    g_A = (1/s^2) (B^T B)^-1 GA + X A
    g_B = (1/s^2) (I - P_B) GB (A A^T)^-1 - B X           E = P_B g + (I - P_B) g P_A

for any X [r, r]; X is spent on staying near the plain gradients, which is a Sylvester equation.
The first-order change of the loss is -lr ||E||^2, whatever X. Gradients grow by 1/s^2: take the
learning rate of full training, not LoRA's. Clipping acts before this, on the plain gradients.
Paper: Wang, Liang, He, Wang and Tan, 2024, arXiv 2407.18242.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from plait.adapter import Method, Pair, Rule, Run
from plait.adapter.choices import check_choices
from plait.adapter.rule import OptimizerFactory
from plait.linalg import damped_inverse, sylvester_symmetric
from plait.rules._moments import AdamMoments
from plait.rules._pair_batches import by_shape, named_pairs, stacked, unpaired, write_back

FreeMatrix = Literal["sylvester", "symmetric", "zero"]
_CHUNK = 2**26  # elements of dW handled at once in the full form, 256 MB in float32


def adjusted_gradients(
    GA: Tensor | None,
    GB: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: Tensor | float,
    free: FreeMatrix = "sylvester",
    damping: float = 1e-8,
) -> tuple[Tensor | None, Tensor | None]:
    """g_A [..., r, in] and g_B [..., out, r] for pairs batched over leading dimensions.

    A factor whose gradient is None is frozen, and the other's best step is then a projection
    alone (A frozen: GB (A A^T)^-1 / s^2, the LoRA-FA optimiser). `damping` is relative to the
    greatest eigenvalue of B^T B or A A^T; a factor of zeros gives zero steps through it.
    """
    square = scale**2
    if GA is None:
        assert GB is not None
        return None, GB @ damped_inverse(A @ A.mT, damping) / square
    inverse_B = damped_inverse(B.mT @ B, damping)
    lower = inverse_B @ GA / square
    if GB is None:
        return lower, None
    right = GB @ damped_inverse(A @ A.mT, damping) / square
    upper = right - B @ (inverse_B @ (B.mT @ right))
    if free == "sylvester":
        X = sylvester_symmetric(B.mT @ B, A @ A.mT, -lower @ A.mT)
    elif free == "symmetric":
        # E's part in both spaces, P_B g P_A, is then carried half by g_A and half by g_B.
        X = -0.5 * inverse_B @ (B.mT @ right)
    else:
        return lower, upper
    return lower + X @ A, upper - B @ X


def equivalent_gradient(
    g_A: Tensor | None, g_B: Tensor | None, A: Tensor, B: Tensor, scale: Tensor | float
) -> Tensor:
    """The direction [..., out, in] in which a step along (g_A, g_B) moves dW, to first order."""
    parts = [] if g_B is None else [g_B @ A]
    if g_A is not None:
        parts.append(B @ g_A)
    return scale * torch.stack(parts).sum(0)


@dataclass
class LoraPro(Rule):
    moments: Literal["lowrank", "full", "none"] = "lowrank"
    """lowrank: AdamW on the adjusted gradients, LoRA's memory. full: the paper's AdamW, moments of
    dW's size (two [out, in] tensors a site, as in full training). none: SGD."""
    free: FreeMatrix = "sylvester"
    """X: nearest to the plain gradients (the paper's), "symmetric", or "zero"."""
    damping: float = 1e-8
    """Of the r x r inverses, relative to the greatest eigenvalue (never below the dtype's epsilon).
    The paper's code adds an absolute 1e-8, which a small B right after the start drowns in."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of the full form's moments."""
    eps: float = 1e-8
    """Of the full form's quotient."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the full form's moments in memory; the paper's code keeps them in bfloat16."""

    needs_pairs = True
    claims = frozenset({"gradients"})

    def __post_init__(self) -> None:
        check_choices(self, "lora-pro")
        self.keeps_shapes = self.moments == "full"

    def setup(self, run: Run) -> None:
        super().setup(run)
        dtype = torch.bfloat16 if self.state_dtype == "bfloat16" else None
        self._moments = AdamMoments(self.betas, self.eps, dtype)

    def optimizer(self) -> OptimizerFactory | None:
        # SGD's L2 term without momentum is decoupled decay, so weight_decay means AdamW's.
        return None if self.moments == "lowrank" else torch.optim.SGD

    @torch.no_grad()
    def before_step(self) -> None:
        self._moments.count += 1
        pairs = list(named_pairs(self.run))
        for batch in by_shape(pairs, _CHUNK if self.moments == "full" else None):
            self._adjust(batch)
        # SGD underneath must get Adam's direction for what is in no pair, too.
        for name, p, gradient in unpaired(self.run, pairs) if self.moments == "full" else ():
            p.grad = self._moments.direction(name, gradient).to(p.dtype)

    def _adjust(self, batch: list[tuple[str, Pair]]) -> None:
        A, B, GA, GB, scale = stacked([p for _, p in batch])
        if self.moments == "full":
            g_A, g_B = adjusted_gradients(GA, GB, A, B, scale, "zero", self.damping)
            E = equivalent_gradient(g_A, g_B, A, B, scale)
            adam = self._moments.direction
            N = torch.stack([adam(name, e) for (name, _), e in zip(batch, E, strict=True)])
            GA = None if GA is None else scale * (B.mT @ N)
            GB = None if GB is None else scale * (N @ A.mT)
        g_A, g_B = adjusted_gradients(GA, GB, A, B, scale, self.free, self.damping)
        write_back([p for _, p in batch], g_A, g_B)

    def state_dict(self) -> dict[str, Any]:
        return self._moments.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._moments.load_state_dict(state)


METHOD = Method(
    name="lora-pro",
    title="LoRA-Pro: gradients of A and B adjusted to follow full training",
    paper="Wang et al., 2024, arXiv 2407.18242",
    axis="rule",
    rule=LoraPro,
)
