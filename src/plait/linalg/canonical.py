"""A singular value decomposition that comes out alike on every machine."""

import torch
from torch import Tensor


def canonical_svd(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [..., m, q], S [..., q] descending, Vh [..., q, n] of M [..., m, n], in float64.

    For whoever derives singular vectors anew instead of storing them. Their signs are arbitrary, so
    each column of U gets a positive entry of greatest magnitude. In float32 one machine's rounding
    turns neighbouring vectors into each other as another's does not; in float64 those of a float32
    matrix agree as far as that matrix determines them. Directions of equal singular values stay
    arbitrary.
    """
    U, S, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    largest = U.gather(-2, U.abs().argmax(-2, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(U)
    return U * signs, S, signs.mT * Vh
