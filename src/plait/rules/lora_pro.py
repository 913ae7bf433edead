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

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from plait.adapter import Method, Pair, Rule, Run
from plait.adapter.rule import OptimizerFactory
from plait.errors import PlaitError
from plait.linalg import damped_inverse, sylvester_symmetric

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

    def __post_init__(self) -> None:
        for name, known in (
            ("moments", ("lowrank", "full", "none")),
            ("free", ("sylvester", "symmetric", "zero")),
            ("state_dtype", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in known:
                given = getattr(self, name)
                raise PlaitError(f"lora-pro: {name} is {given!r}; use one of {', '.join(known)}.")

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._count = 0
        self._kept: dict[str, list[Tensor]] = {}

    def optimizer(self) -> OptimizerFactory | None:
        # SGD's L2 term without momentum is decoupled decay, so weight_decay means AdamW's.
        return None if self.moments == "lowrank" else torch.optim.SGD

    @torch.no_grad()
    def before_step(self) -> None:
        self._count += 1
        pairs = list(named_pairs(self.run))
        for batch in equal_shapes(pairs, _CHUNK if self.moments == "full" else None):
            self._adjust(batch)
        if self.moments == "full":
            self._adjust_loose({id(t) for _, p in pairs for t in (p.A, p.B)})

    def _adjust(self, batch: list[tuple[str, Pair]]) -> None:
        A, B, GA, GB, scale = stacked([p for _, p in batch])
        if self.moments == "full":
            g_A, g_B = adjusted_gradients(GA, GB, A, B, scale, "zero", self.damping)
            E = equivalent_gradient(g_A, g_B, A, B, scale)
            N = torch.stack([self._adam(n, e) for (n, _), e in zip(batch, E, strict=True)])
            GA = None if GA is None else scale * (B.mT @ N)
            GB = None if GB is None else scale * (N @ A.mT)
        g_A, g_B = adjusted_gradients(GA, GB, A, B, scale, self.free, self.damping)
        for index, (_, pair) in enumerate(batch):
            if g_A is not None:
                pair.A.grad = g_A[index].to(pair.A.dtype)
            if g_B is not None:
                pair.B.grad = g_B[index].to(pair.B.dtype)

    def _adjust_loose(self, paired: set[int]) -> None:
        """Parameters outside pairs: SGD underneath must get Adam's direction for them too."""
        for adapter in self.run.adapters:
            for name, p in adapter.named_parameters():
                if p.grad is not None and id(p) not in paired:
                    key = f"{adapter.name}/{name}"
                    p.grad = self._adam(key, p.grad.to(_at_least_float32(p))).to(p.dtype)

    def _adam(self, key: str, gradient: Tensor) -> Tensor:
        """Adam's normalised direction for `gradient`, from moments kept under `key`."""
        dtype = torch.bfloat16 if self.state_dtype == "bfloat16" else gradient.dtype
        if key not in self._kept:
            zeros = torch.zeros_like(gradient, dtype=dtype)
            self._kept[key] = [zeros, zeros.clone()]
        b1, b2 = self.betas
        first = self._kept[key][0].to(gradient).lerp(gradient, 1 - b1)
        second = self._kept[key][1].to(gradient).lerp(gradient.square(), 1 - b2)
        self._kept[key] = [first.to(dtype), second.to(dtype)]
        root = (second / (1 - b2**self._count)).sqrt() + self.eps
        return first / (1 - b1**self._count) / root

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count, "moments": {k: list(v) for k, v in self._kept.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._count = int(state["count"])
        devices = {n: p.A.device for n, p in named_pairs(self.run)}
        self._kept = {
            key: [t.to(devices.get(key, t.device)).clone() for t in both]
            for key, both in state["moments"].items()
        }


def named_pairs(run: Run) -> Iterator[tuple[str, Pair]]:
    """("adapter/site path", pair) of every pair with a gradient and a rank above 0."""
    for adapter in run.adapters:
        for pair in adapter.pairs():
            trains = pair.A.grad is not None or pair.B.grad is not None
            if trains and pair.A.shape[-2] > 0:
                yield f"{adapter.name}/{pair.path}", pair


def equal_shapes(
    pairs: Iterable[tuple[str, Pair]], limit: int | None
) -> Iterator[list[tuple[str, Pair]]]:
    """The pairs in batches of equal shapes and dtypes (at most `limit` numbers of dW each)."""
    found: dict[Any, list[tuple[str, Pair]]] = {}
    for name, p in pairs:
        frozen = (p.A.grad is None, p.B.grad is None)
        key = (p.A.shape, p.B.shape, p.A.dtype, p.B.dtype, p.A.device, frozen)
        found.setdefault(key, []).append((name, p))
    for (a, b, *_), group in found.items():
        size = len(group) if limit is None else max(1, limit // (a.numel() // a[-2] * b[-2]))
        yield from (group[start : start + size] for start in range(0, len(group), size))


def stacked(
    pairs: list[Pair],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """A, B, their gradients (None where frozen) and scales, stacked in at least float32."""
    dtype = _at_least_float32(pairs[0].A)

    def stack(tensors: list[Tensor | None]) -> Tensor | None:
        if tensors[0] is None:
            return None
        return torch.stack([t.to(dtype) for t in tensors if t is not None])

    A, B = stack([p.A for p in pairs]), stack([p.B for p in pairs])
    assert A is not None and B is not None
    scale = torch.tensor([p.scale for p in pairs], dtype=dtype, device=A.device)
    scale = scale.reshape(-1, *([1] * (A.dim() - 1)))
    return A, B, stack([p.A.grad for p in pairs]), stack([p.B.grad for p in pairs]), scale


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


METHOD = Method(
    name="lora-pro",
    title="LoRA-Pro: gradients of A and B adjusted to follow full training",
    paper="Wang et al., 2024, arXiv 2407.18242",
    axis="rule",
    rule=LoraPro,
)
