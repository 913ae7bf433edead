"""(A, B) pairs with gradients, in batches of one shape, for rules that solve for many at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from plait.adapter import Pair, Run


def named_pairs(run: Run) -> Iterator[tuple[str, Pair]]:
    """("adapter/site path", pair) of every pair with a gradient and a rank above 0."""
    for adapter in run.adapters:
        for pair in adapter.pairs():
            trains = pair.A.grad is not None or pair.B.grad is not None
            if trains and pair.A.shape[-2] > 0:
                yield f"{adapter.name}/{pair.path}", pair


def by_shape(
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

    def stack(tensors: list[Tensor | None]) -> Tensor | None:
        if tensors[0] is None:
            return None
        return torch.stack([_wide(t) for t in tensors if t is not None])

    A, B = stack([p.A for p in pairs]), stack([p.B for p in pairs])
    assert A is not None and B is not None
    scale = torch.tensor([p.scale for p in pairs], dtype=A.dtype, device=A.device)
    scale = scale.reshape(-1, *([1] * (A.dim() - 1)))
    return A, B, stack([p.A.grad for p in pairs]), stack([p.B.grad for p in pairs]), scale


def write_back(pairs: list[Pair], g_A: Tensor | None, g_B: Tensor | None) -> None:
    """Give stacked gradients back to their pairs' parameters; None leaves those as they are."""
    for index, pair in enumerate(pairs):
        if g_A is not None:
            pair.A.grad = g_A[index].to(pair.A.dtype)
        if g_B is not None:
            pair.B.grad = g_B[index].to(pair.B.dtype)


def unpaired(
    run: Run, pairs: Iterable[tuple[str, Pair]]
) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """("adapter/name", parameter, wide gradient) of what has one and stands in none of `pairs`."""
    paired = {id(t) for _, p in pairs for t in (p.A, p.B)}
    for adapter in run.adapters:
        for name, p in adapter.named_parameters():
            if p.grad is not None and id(p) not in paired:
                yield f"{adapter.name}/{name}", p, _wide(p.grad)


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
