"""Randomised SVD of a dense matrix: the leading singular triplets at the cost of a few products.

Halko, Martinsson, Tropp, "Finding structure with randomness", 2011, arXiv 0909.4061: sketch the
range with a random matrix, sharpen it by power iterations with a QR after every product (without
it, float32 loses each direction below the square root of its precision), project, and take a
small SVD.
"""

from typing import Literal

import torch
from torch import Tensor

from plait.linalg.gram import gram_directions
from plait.linalg.lowrank import LowRank
from plait.linalg.precision import accumulator_dtype, require_finite, working_dtype


def randomized_svd(
    M: Tensor,
    rank: int,
    *,
    oversample: int = 8,
    power_iterations: int = 2,
    generator: torch.Generator | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """U [..., m, rank], S [..., rank], Vh [..., rank, n] of M [..., m, n], in working precision.

    `oversample`: extra sketch columns; `power_iterations`: more of them for a slowly decaying
    spectrum, each two products with M. The sketch is drawn from `generator`, else from a CPU
    generator seeded with `seed`: the global random state is neither read nor changed, and devices
    agree. With rank + oversample >= min(m, n) the exact SVD is taken, as a sketch would be no
    smaller than M. Raises ValueError for rank outside 0..min(m, n), NaN or infinity, or negative
    options.
    """
    _check(M, rank, oversample, power_iterations)
    M = M.to(working_dtype(M.dtype))
    width = rank + oversample
    if width >= min(M.shape[-2:]):
        return _leading(torch.linalg.svd(M, full_matrices=False), rank)
    if M.shape[-2] < M.shape[-1]:
        # The tall orientation needs the random matrix on the shorter side only.
        V, S, Uh = _sketched_svd(M.mT, width, power_iterations, generator, seed)
        return _leading((Uh.mT, S, V.mT), rank)
    return _leading(_sketched_svd(M, width, power_iterations, generator, seed), rank)


def krylov_svd(
    M: Tensor,
    rank: int,
    *,
    oversample: int = 8,
    depth: int = 20,
    generator: torch.Generator | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `randomized_svd`, from all the sketch's powers together (a block Krylov space).

    The last power alone tells directions apart as (S_r / S_{r + oversample})^(2 depth), the space
    of all of them as a Chebyshev polynomial of that degree: where singular values lie within a
    percent of each other, as in trained weights, this finds the very subspace, at the price of a
    basis of (rank + oversample) * depth columns. Where that is more than half of M's shorter side,
    the eigenvectors of its Gram matrix in float64 are cheaper and are taken instead.
    Musco and Musco, 2015, arXiv 1504.05477.
    """
    _check(M, rank, oversample, depth)
    M = M.to(working_dtype(M.dtype))
    if M.shape[-2] < M.shape[-1]:
        V, S, Uh = krylov_svd(
            M.mT, rank, oversample=oversample, depth=depth, generator=generator, seed=seed
        )
        return Uh.mT, S, V.mT
    width = rank + oversample
    if 2 * width * depth >= M.shape[-1]:
        return _by_gram(M, rank)
    if generator is None:
        generator = torch.Generator().manual_seed(seed)
    size = (*M.shape[:-2], M.shape[-1], width)
    block = torch.randn(size, generator=generator, device=generator.device, dtype=M.dtype)
    block, blocks = torch.linalg.qr(block.to(M.device)).Q, []
    for _ in range(depth):
        block = torch.linalg.qr(M.mT @ (M @ block)).Q
        blocks.append(block)
    basis = torch.linalg.qr(torch.cat(blocks, -1)).Q
    U, S, Vh = torch.linalg.svd(M @ basis, full_matrices=False)
    return _leading((U, S, Vh @ basis.mT), rank)


def _by_gram(M: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading triplets of a tall M, to float32's last digits as far as M determines them."""
    wide = M.to(accumulator_dtype(M.device))
    rows = gram_directions(wide.mT)[0][..., :rank, :]  # M.mT is flat, also where M is square
    U, S, Vh = torch.linalg.svd(wide @ rows.mT, full_matrices=False)
    return U.to(M.dtype), S.to(M.dtype), (Vh @ rows).to(M.dtype)


def low_rank_approximation(
    M: Tensor, rank: int, method: Literal["randomized", "exact"] = "randomized", *, seed: int = 0
) -> LowRank:
    """M [..., m, n] approximated in `rank`, as a LowRank of M's dtype with sqrt(S) on both sides.

    "exact" takes the full SVD (the best approximation there is), "randomized" the sketch of
    `randomized_svd`, reproducible from `seed`. Raises ValueError as that does, or for another
    method.
    """
    if method == "randomized":
        factors = randomized_svd(M, rank, seed=seed)
    elif method == "exact":
        _check(M, rank, 0, 0)
        full = torch.linalg.svd(M.to(working_dtype(M.dtype)), full_matrices=False)
        factors = _leading(full, rank)
    else:
        raise ValueError(
            f"low_rank_approximation: unknown method {method!r}; give 'randomized' or 'exact'"
        )
    return LowRank.from_svd(*factors, dtype=M.dtype)


def _sketched_svd(
    M: Tensor, width: int, iterations: int, generator: torch.Generator | None, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    if generator is None:
        generator = torch.Generator().manual_seed(seed)
    size = (*M.shape[:-2], M.shape[-1], width)
    sketch = torch.randn(size, generator=generator, device=generator.device, dtype=M.dtype)
    Q = torch.linalg.qr(M @ sketch.to(M.device)).Q
    for _ in range(iterations):
        Z = torch.linalg.qr(M.mT @ Q).Q
        Q = torch.linalg.qr(M @ Z).Q
    U, S, Vh = torch.linalg.svd(Q.mT @ M, full_matrices=False)
    return Q @ U, S, Vh


def _leading(factors: tuple[Tensor, Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = factors
    return U[..., :rank], S[..., :rank], Vh[..., :rank, :]


def _check(M: Tensor, rank: int, oversample: int, iterations: int) -> None:
    if M.ndim < 2 or not 0 <= rank <= min(M.shape[-2:]):
        raise ValueError(
            f"randomized SVD: rank {rank} for a matrix of shape {tuple(M.shape)}; "
            "give a rank from 0 to the shorter side"
        )
    if oversample < 0 or iterations < 0:
        raise ValueError(
            f"randomized SVD: oversample {oversample} and power_iterations {iterations}; "
            "give 0 or more of each"
        )
    require_finite(M, "the matrix", "randomized SVD")
