"""Inputs and the independent oracle of the kernel tests: dense float64 algebra and autograd.

The oracle forms dW = s B A and multiplies with W + dW; it shares no code with `plait.kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plait.kernels import dropout_mask, keep_probability


@dataclass
class Case:
    """One LoRA linear: x, weight, bias, A, B, scale and the gradient of its output."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scale: float
    grad: Tensor


def make_case(
    batch: tuple[int, ...] = (3, 5),
    inputs: int = 6,
    outputs: int = 7,
    rank: int = 2,
    *,
    bias: bool = True,
    strided: bool = False,
    dtype: torch.dtype = torch.float64,
    factor_dtype: torch.dtype | None = None,
    train: str = "xAB",
) -> Case:
    """Normal entries; `train` names the tensors that require gradients."""
    factor_dtype = factor_dtype or dtype
    weight = torch.randn(outputs, inputs, dtype=dtype)
    if strided:  # what Conv1D's [in, out] weight looks like after .T
        weight = torch.randn(inputs, outputs, dtype=dtype).T
    return Case(
        x=torch.randn(*batch, inputs, dtype=dtype).requires_grad_("x" in train),
        weight=weight,
        bias=torch.randn(outputs, dtype=dtype) if bias else None,
        A=torch.randn(rank, inputs, dtype=factor_dtype).requires_grad_("A" in train),
        B=torch.randn(outputs, rank, dtype=factor_dtype).requires_grad_("B" in train),
        scale=0.7,
        grad=torch.randn(*batch, outputs, dtype=dtype),
    )


def oracle(case: Case, dropout: float = 0.0, seed: int = 0) -> list[Tensor | None]:
    """[y, dx, dA, dB] in float64; None for a tensor that does not require a gradient."""
    leaves = [t.detach().double().requires_grad_(t.requires_grad) for t in (case.x, case.A, case.B)]
    x, A, B = leaves
    y = x @ case.weight.double().T
    if case.bias is not None:
        y = y + case.bias.double()
    dropped = x
    if dropout:
        mask = dropout_mask(tuple(x.shape), dropout, seed).double()
        dropped = x * mask / keep_probability(dropout)
    y = y + dropped @ (case.scale * B @ A).T
    wanted = [t for t in leaves if t.requires_grad]
    grads = iter(torch.autograd.grad(y, wanted, case.grad.double(), allow_unused=True))
    return [y.detach()] + [next(grads) if t.requires_grad else None for t in leaves]


def measured(case: Case, y: Tensor) -> list[Tensor | None]:
    """[y, dx, dA, dB] of a kernel's output y."""
    y.backward(case.grad.to(y.dtype))
    found: list[Tensor | None] = [y.detach()]
    for leaf in (case.x, case.A, case.B):
        found.append(leaf.grad)
        leaf.grad = None
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected entry."""
    if not expected.numel():
        return 0.0
    scale = expected.abs().max().clamp_min(1e-30)
    return float((found.double() - expected.double()).abs().max() / scale)


def assert_agrees(
    found: list[Tensor | None], expected: list[Tensor | None], tolerance: float
) -> None:
    """Entry by entry: both absent, or equal to the tolerance."""
    for name, mine, theirs in zip(("y", "dx", "dA", "dB"), found, expected, strict=True):
        if theirs is None:
            assert mine is None, f"{name}: a gradient nobody asked for"
            continue
        assert mine is not None, f"{name}: no gradient"
        assert mine.shape == theirs.shape, name
        assert relative_error(mine, theirs) <= tolerance, name
