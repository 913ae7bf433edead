"""How far from orthonormal the rows of many small matrices are, as one term of a loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def orthogonality(rows: Sequence[Tensor]) -> Tensor:
    """Sum over matrices [r, n] of ||M M^T - I||_F, equal shapes in one batch."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for matrix in rows:
        by_shape.setdefault(matrix.shape, []).append(matrix)
    total = []
    for (r, _), group in by_shape.items():
        stack = torch.stack(group)
        eye = torch.eye(r, dtype=stack.dtype, device=stack.device)
        total.append(torch.linalg.matrix_norm(stack @ stack.mT - eye).sum())
    return torch.stack(total).sum()
