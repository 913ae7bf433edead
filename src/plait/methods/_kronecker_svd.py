"""The principal Kronecker terms of a matrix, and how many of them its spectrum asks for.

Read as the matrix of its blocks (`to_blocks`), a Kronecker product has rank 1, so an SVD of W
read that way gives the best sums of Kronecker products (Van Loan, Pitsianis, 1993).
"""

from __future__ import annotations

import torch
from torch import Tensor

from plait.linalg import randomized_svd
from plait.linalg.precision import working_dtype
from plait.methods._kronecker import to_blocks

WINDOW = 32
"""Leading singular values in which a bend is looked for, at least."""


def kronecker_terms(
    W: Tensor, m: int, n: int, most: int, energy: float, elbow: bool
) -> tuple[Tensor, Tensor]:
    """A [K, m, n] and B [K, p, q], both carrying sqrt(sigma_k), with W ~ sum_k A_k kron B_k.

    K is what `choose_terms` says, at most `most`. In working precision (float32 or float64).
    """
    blocks = to_blocks(W, m, n).to(working_dtype(W.dtype))
    U, S, Vh = randomized_svd(blocks, min(max(2 * most, WINDOW), *blocks.shape))
    K = min(choose_terms(S, blocks.square().sum(), energy, elbow), most)
    root = S[:K].sqrt()
    A, B = (U[:, :K] * root).t(), root[:, None] * Vh[:K]
    return A.reshape(K, m, n), B.reshape(K, W.shape[0] // m, W.shape[1] // n)


def choose_terms(S: Tensor, total: Tensor, energy: float, elbow: bool) -> int:
    """The fewest terms that hold `energy` of `total`, or fewer where S bends; at least 1.

    S [L] holds the leading singular values, descending, and `total` is the sum of all squares;
    L + 1 says that all of S is not enough. The bend is where S lies farthest below the chord from
    its first value to its last; the value there is the first of the flat part and is left out. A
    spectrum that lies nowhere below its chord has none.
    """
    enough = int((S.square().cumsum(0) < energy * total).sum()) + 1
    span = S[0] - S[-1]
    if not elbow or len(S) < 3 or not span > 0:
        return enough
    chord = 1 - torch.linspace(0, 1, len(S), dtype=S.dtype, device=S.device)
    below, place = (chord - (S - S[-1]) / span).max(0)
    return min(enough, max(int(place), 1)) if below > 1e-6 else enough
