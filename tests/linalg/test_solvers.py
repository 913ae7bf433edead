"""Solvers against their defining equations and against general dense solvers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from plait.linalg import damped_inverse, principal_angles, procrustes, sylvester_symmetric

check = settings(deadline=None, max_examples=30)
batches = st.sampled_from([(), (2,), (2, 3)])
sides = st.integers(1, 7)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def positive(*shape):
    root = normal(*shape, shape[-1])
    return root @ root.mT + 0.1 * torch.eye(shape[-1], dtype=torch.float64)


@check
@given(batches, sides, sides)
def test_sylvester_residual_and_kronecker_oracle(batch, m, n):
    P, Q, C = positive(*batch, m), positive(*batch, n), normal(*batch, m, n)
    X = sylvester_symmetric(P, Q, C)
    assert_close(P @ X + X @ Q, C, atol=1e-10, rtol=0)
    if not batch:
        eye = {k: torch.eye(k, dtype=torch.float64) for k in (m, n)}
        system = torch.kron(P, eye[n]) + torch.kron(eye[m], Q.mT.contiguous())
        expected = torch.linalg.solve(system, C.reshape(-1)).reshape(m, n)
        assert_close(X, expected, atol=1e-8, rtol=1e-8)


@check
@given(sides, sides, st.integers(0, 3), st.integers(0, 3))
def test_sylvester_of_singular_matrices_solves_what_can_be_solved(m, n, p, q):
    F, G = normal(m, min(p, m)), normal(n, min(q, n))
    P, Q = F @ F.mT, G @ G.mT
    solvable = P @ normal(m, n) + normal(m, n) @ Q
    X = sylvester_symmetric(P, Q, solvable)
    assert_close(P @ X + X @ Q, solvable, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sylvester_stays_bounded_on_a_shared_null_space(dtype):
    P = torch.diag(torch.tensor([1.0, 0.5, 0.0])).to(dtype)
    X = sylvester_symmetric(P, P, P @ torch.ones(3, 3, dtype=dtype) @ P)
    assert X.dtype == dtype and float(X.abs().max()) < 1
    assert not sylvester_symmetric(0 * P, 0 * P, torch.ones(3, 3, dtype=dtype)).any()
    tiny = P + 1e-30 * torch.eye(3, dtype=dtype)
    assert float(sylvester_symmetric(tiny, tiny, torch.ones_like(P)).abs().max()) < 1e8
    free = sylvester_symmetric(P, P, torch.ones(3, 3, dtype=dtype))
    assert bool(torch.isfinite(free).all())


@check
@given(batches, sides)
def test_damped_inverse_is_the_inverse_of_the_damped_matrix(batch, n):
    M = positive(*batch, n)
    greatest = torch.linalg.eigvalsh(M)[..., -1].reshape(*batch, 1, 1)
    eye = torch.eye(n, dtype=torch.float64)
    expected = torch.linalg.inv(M + 1e-3 * greatest * eye)
    assert_close(damped_inverse(M, 1e-3), expected, rtol=1e-8, atol=1e-9)
    assert_close(M @ damped_inverse(M, 0.0), eye.expand_as(M), rtol=1e-8, atol=1e-8)


def test_damped_inverse_of_singular_and_zero_matrices():
    f = torch.randn(6, 2)
    inverse = damped_inverse(f @ f.mT)
    assert bool(torch.isfinite(inverse).all()) and inverse.dtype == torch.float32
    # The null space is damped at float32's epsilon, so the inverse is at most 1 / (eps * l_max).
    bound = 1 / (torch.finfo(torch.float32).eps * float(torch.linalg.eigvalsh(f @ f.mT)[-1]))
    assert float(torch.linalg.matrix_norm(inverse, 2)) <= 1.01 * bound
    stacked = torch.stack([torch.zeros(3, 3), torch.eye(3)])
    assert_close(damped_inverse(stacked), stacked)
    assert not damped_inverse(torch.full((1, 1), 1e-42)).isinf().any()
    assert damped_inverse(torch.eye(3, dtype=torch.bfloat16)).dtype == torch.bfloat16


@check
@given(batches, st.integers(1, 8), sides)
def test_procrustes_is_orthogonal_and_beats_other_rotations(batch, n, d):
    X, Y = normal(*batch, n, d), normal(*batch, n, d)
    R = procrustes(X, Y)
    assert_close(R @ R.mT, torch.eye(d, dtype=torch.float64).expand(*batch, d, d))
    best = (X @ R - Y).square().sum((-2, -1))
    for _ in range(5):
        other = torch.linalg.qr(normal(*batch, d, d)).Q
        assert bool((best <= (X @ other - Y).square().sum((-2, -1)) + 1e-10).all())


def test_procrustes_recovers_a_rotation():
    X, R = normal(20, 5), torch.linalg.qr(normal(5, 5)).Q
    assert_close(procrustes(X, X @ R), R)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("angle", [0.0, 1e-6, 0.1, 0.78, 0.79, 1.5, math.pi / 2])
def test_principal_angles_recover_a_constructed_angle(angle, dtype):
    Q = torch.linalg.qr(normal(9, 4)).Q
    U = Q[:, :2]
    tilted = Q[:, 1] * math.cos(angle) + Q[:, 2] * math.sin(angle)
    V = torch.stack([Q[:, 0] + tilted, 2 * tilted], -1)
    found = principal_angles(U.to(dtype), V.to(dtype))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert_close(found.double(), torch.tensor([0.0, angle]).double(), atol=tolerance, rtol=1e-6)


@check
@given(batches, st.integers(1, 8), st.data())
def test_principal_angles_agree_with_cosines_and_are_symmetric(batch, n, data):
    p, q = (data.draw(st.integers(0, n)) for _ in range(2))
    U, V = normal(*batch, n, p), normal(*batch, n, q)
    angles = principal_angles(U, V)
    assert angles.shape == (*batch, min(p, q))
    cosines = torch.linalg.svdvals(torch.linalg.qr(U).Q.mT @ torch.linalg.qr(V).Q)
    assert_close(angles.cos(), cosines)
    assert_close(angles, principal_angles(V, U), atol=1e-7, rtol=1e-7)


def test_errors_name_shapes_and_nan():
    square, bad = torch.eye(3), torch.full((3, 3), torch.nan)
    with pytest.raises(ValueError, match=r"C \(3, 4\)"):
        sylvester_symmetric(square, square, torch.ones(3, 4))
    with pytest.raises(ValueError, match="square"):
        damped_inverse(torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"\(3, 3\) and Y \(4, 3\)"):
        procrustes(square, torch.ones(4, 3))
    with pytest.raises(ValueError, match="no more of them"):
        principal_angles(torch.ones(2, 3), torch.ones(2, 1))
    for call in (
        lambda: sylvester_symmetric(square, bad, square),
        lambda: damped_inverse(bad),
        lambda: procrustes(square, bad),
        lambda: principal_angles(bad, square),
    ):
        with pytest.raises(ValueError, match="NaN"):
            call()
