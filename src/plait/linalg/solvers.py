"""Small dense solvers that adapters need: Sylvester, damped inverse, Procrustes, subspace angles.

All are batched over leading dimensions, compute in float32 (float64 stays) and return the dtype of
their first argument. Symmetric arguments are read from their lower triangle.
"""

import torch
from torch import Tensor

from plait.linalg.precision import require_finite, working_dtype


def sylvester_symmetric(P: Tensor, Q: Tensor, C: Tensor, *, relative: float = 1e-8) -> Tensor:
    """X [..., m, n] with P X + X Q = C, for symmetric positive semidefinite P [m, m], Q [n, n].

    In the eigenbases of P and Q the equation is X_ij (l_i + k_j) = C_ij. Sums below `relative`
    times the greatest one (never less than the dtype's epsilon) are raised to that floor: exact
    where the equation is well posed, bounded where P and Q share a null space. X = 0 if both
    are 0. Raises ValueError for shapes that do not fit, NaN or infinity.
    """
    m, n = C.shape[-2:]
    if P.shape[-2:] != (m, m) or Q.shape[-2:] != (n, n):
        raise ValueError(
            f"sylvester_symmetric: P {tuple(P.shape)}, Q {tuple(Q.shape)}, C {tuple(C.shape)}; "
            "for C [m, n] give P [m, m] and Q [n, n]"
        )
    dtype = working_dtype(P.dtype, Q.dtype, C.dtype)
    for value, name in ((P, "P"), (Q, "Q"), (C, "C")):
        require_finite(value, name, "sylvester_symmetric")
    l, U = torch.linalg.eigh(P.to(dtype))
    k, V = torch.linalg.eigh(Q.to(dtype))
    sums = l.clamp_min(0).unsqueeze(-1) + k.clamp_min(0).unsqueeze(-2)
    greatest = sums.amax((-2, -1), keepdim=True) if sums.numel() else sums.new_zeros(1, 1)
    damped = sums.clamp_min(_at_least_epsilon(relative, dtype) * greatest)
    X = (U.mT @ C.to(dtype) @ V) * _reciprocal_or_zero(damped)
    return (U @ X @ V.mT).to(P.dtype)


def damped_inverse(M: Tensor, relative: float = 1e-8) -> Tensor:
    """(M + relative * l_max * I)^-1 for symmetric positive semidefinite M [..., n, n].

    l_max is M's greatest eigenvalue, so the damping has no unit to tune; `relative` is never taken
    below the dtype's epsilon, where it would drown in rounding. A zero matrix gives 0, its
    pseudo-inverse (a LoRA whose B is still 0 then takes no step instead of an infinite one).
    Raises ValueError for a matrix that is not square, NaN or infinity.
    """
    if M.ndim < 2 or M.shape[-1] != M.shape[-2]:
        raise ValueError(f"damped_inverse: shape {tuple(M.shape)}; give a square matrix")
    require_finite(M, "M", "damped_inverse")
    dtype = working_dtype(M.dtype)
    values, vectors = torch.linalg.eigh(M.to(dtype))
    values = values.clamp_min(0)
    damped = values + _at_least_epsilon(relative, dtype) * values[..., -1:]
    return ((vectors * _reciprocal_or_zero(damped).unsqueeze(-2)) @ vectors.mT).to(M.dtype)


def procrustes(X: Tensor, Y: Tensor) -> Tensor:
    """The orthogonal R [..., d, d] that minimises ||X R - Y||_F, for X and Y [..., n, d].

    Reflections are allowed. Schoenemann, "A generalized solution of the orthogonal Procrustes
    problem", 1966: R = U V^T from the SVD of X^T Y. Raises ValueError for unequal shapes, NaN or
    infinity.
    """
    if X.ndim < 2 or X.shape != Y.shape:
        raise ValueError(
            f"procrustes: X {tuple(X.shape)} and Y {tuple(Y.shape)}; give equal shapes [..., n, d]"
        )
    require_finite(X, "X", "procrustes")
    require_finite(Y, "Y", "procrustes")
    dtype = working_dtype(X.dtype, Y.dtype)
    U, _, Vh = torch.linalg.svd(X.to(dtype).mT @ Y.to(dtype))
    return (U @ Vh).to(X.dtype)


def principal_angles(U: Tensor, V: Tensor) -> Tensor:
    """Angles in radians, ascending, between the column spaces of U [..., n, p] and V [..., n, q].

    The min(p, q) angles lie in [0, pi/2]; the columns need not be orthonormal but must be
    independent. Small angles come from sines, since a cosine near 1 has lost them (Bjoerck and
    Golub, 1973). Raises ValueError for unequal n, more columns than n, NaN or infinity.
    """
    if U.shape[-2] != V.shape[-2] or max(U.shape[-1], V.shape[-1]) > U.shape[-2]:
        raise ValueError(
            f"principal_angles: U {tuple(U.shape)} and V {tuple(V.shape)}; "
            "give equally long columns, no more of them than their length"
        )
    require_finite(U, "U", "principal_angles")
    require_finite(V, "V", "principal_angles")
    dtype = working_dtype(U.dtype, V.dtype)
    larger, smaller = (U, V) if U.shape[-1] >= V.shape[-1] else (V, U)
    Ql = torch.linalg.qr(larger.to(dtype)).Q
    Qs = torch.linalg.qr(smaller.to(dtype)).Q
    shared = Ql.mT @ Qs
    cosines = torch.linalg.svdvals(shared).clamp(max=1)
    sines = torch.linalg.svdvals(Qs - Ql @ shared).flip(-1).clamp(max=1)
    angles = torch.where(cosines.square() > 0.5, torch.asin(sines), torch.acos(cosines))
    return angles.to(U.dtype)


def _at_least_epsilon(relative: float, dtype: torch.dtype) -> float:
    return max(relative, torch.finfo(dtype).eps)


def _reciprocal_or_zero(x: Tensor) -> Tensor:
    usable = x >= torch.finfo(x.dtype).tiny  # the reciprocal of a subnormal overflows
    return torch.where(usable, 1 / torch.where(usable, x, 1), 0)
