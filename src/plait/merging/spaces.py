"""One site merged in the space that was asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from plait.errors import PlaitError
from plait.linalg import LowRank, column_signs
from plait.merging.changes import Changes
from plait.merging.method import Merge, Space

NOISE = 1e-6
"""Shared directions below this share of the largest singular value are rounding."""


def merge_site(
    method: Merge, changes: Changes, weights: Sequence[float], space: Space
) -> LowRank | Tensor:
    """The merged change of one site: a LowRank, or (in space `delta`) dW itself [out, in]."""
    if space == "delta":
        return by_entries(method, changes, weights)
    if changes.lows is None:
        raise PlaitError(
            f"site {changes.path!r} has no factors to work on in space {space!r}; use 'delta', or "
            "extract adapters from the checkpoints first."
        )
    if space == "factors":
        return method.merge(changes.lows, weights, changes)
    basis, coordinates = align(changes.lows)
    if basis.shape[1] == 0:
        return LowRank(basis, coordinates[0])
    inner = Changes(
        changes.path,
        dense=coordinates,
        seed=changes.seed,
        block=changes.block,
        statistics=changes.statistics,
        basis=basis,
    )
    return LowRank(basis, by_entries(method, inner, weights))


def by_entries(method: Merge, changes: Changes, weights: Sequence[float]) -> Tensor:
    """Survey and combine, block by block of rows: [out, in]."""
    w = torch.tensor(list(weights), dtype=changes.dtype)[:, None, None]
    found = method.survey(changes, w)
    out = torch.empty(changes.shape, dtype=changes.dtype)
    for rows in changes.ranges():
        merged = method.combine(changes.rows(rows), rows, w, changes, found)
        out[rows.start : rows.stop] = merged
    return out


def align(lows: Sequence[LowRank]) -> tuple[Tensor, list[Tensor]]:
    """A shared orthonormal basis U [out, p] and coordinates C_i [p, in] with U C_i = dW_i (KnOTS).

    U holds the left singular vectors of [dW_1 .. dW_k]: with the stacked B = Q R its Gram matrix is
    Q (sum_i R_i A_i A_i^T R_i^T) Q^T, of the size of the ranks' sum. Each vector's sign makes its
    largest entry positive. p is at most the sum of the ranks.
    Stoica et al., 2024, arXiv 2410.19735.
    """
    dtype = torch.float32
    for low in lows:
        dtype = torch.promote_types(dtype, low.dtype)
    B = torch.cat([low.B.double() * low.scale for low in lows], dim=-1)
    Q, R = torch.linalg.qr(B)
    parts = list(R.split([low.rank for low in lows], dim=-1))
    mapped = [part @ low.A.double() for part, low in zip(parts, lows, strict=True)]
    values, vectors = torch.linalg.eigh(sum(m @ m.mT for m in mapped))
    values, vectors = values.flip(-1), vectors.flip(-1)
    kept = values.clamp_min(0).sqrt() > NOISE * values.clamp_min(0).sqrt()[:1]
    vectors = vectors[:, kept] if len(values) else vectors
    U = Q @ vectors
    if U.shape[1]:
        signs = column_signs(U)
        U, vectors = U * signs, vectors * signs
    return U.to(dtype), [(vectors.mT @ m).to(dtype) for m in mapped]
