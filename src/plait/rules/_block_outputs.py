"""What the transformer blocks hand on in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from plait.adapter import find_blocks


@contextmanager
def block_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that the next forward within the block fills, one hidden state a transformer block."""
    found: list[Tensor] = []

    def note(module: nn.Module, args: object, output: object) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)  # type: ignore[arg-type]

    handles = [block.register_forward_hook(note) for _, block in find_blocks(model)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def shortfall(ours: list[Tensor], theirs: list[Tensor], mask: Tensor | None) -> Tensor:
    """mean(relu(theirs - ours)^2) over layers, tokens (those of `mask` [batch, length]) and dims.

    Only where `theirs` lies above `ours` is there a gradient, and it raises `ours`.
    """
    terms = []
    for low, high in zip(ours, theirs, strict=True):
        wide = torch.promote_types(low.dtype, torch.float32)
        gap = (high.to(wide) - low.to(wide)).relu().square()
        if mask is not None and mask.dim() == 2 and mask.shape == gap.shape[:-1]:
            real = mask.to(wide)
            terms.append((gap.mean(-1) * real).sum() / real.sum())
        else:
            terms.append(gap.mean())
    return torch.stack(terms).mean()
