"""Randomised SVD against the exact one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from plait.linalg import krylov_svd, low_rank_approximation, principal_angles, randomized_svd

check = settings(deadline=None, max_examples=25)


def decaying(m, n, rate=0.8, seed=0, dtype=torch.float64):
    """A matrix with singular values rate ** i and random singular vectors, and its SVD."""
    g = torch.Generator().manual_seed(seed)
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(m, k, generator=g, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64)).Q
    S = rate ** torch.arange(k, dtype=torch.float64)
    return ((U * S) @ V.mT).to(dtype), U, S, V


@pytest.mark.parametrize("shape", [(200, 90), (90, 200), (120, 120)])
def test_finds_the_leading_subspaces(shape):
    M, U, S, V = decaying(*shape)
    u, s, vh = randomized_svd(M, 8)
    assert u.shape == (shape[0], 8) and s.shape == (8,) and vh.shape == (8, shape[1])
    assert float(principal_angles(u, U[:, :8]).max()) < 1e-3
    assert float(principal_angles(vh.mT, V[:, :8]).max()) < 1e-3
    assert_close(s, S[:8], rtol=1e-6, atol=0)
    eye = torch.eye(8, dtype=torch.float64)
    assert_close(u.mT @ u, eye)
    assert_close(vh @ vh.mT, eye)


def test_power_iterations_and_oversampling_sharpen_the_subspace():
    M, U, _, _ = decaying(150, 150, rate=0.95)

    def angle(**options):
        return float(principal_angles(randomized_svd(M, 8, **options)[0], U[:, :8]).max())

    assert angle(power_iterations=8) < 0.3 * angle(power_iterations=0)
    assert angle(oversample=60) < 0.3 * angle(oversample=0)


def test_float32_keeps_small_directions_through_many_iterations():
    M, _, S, _ = decaying(150, 100, rate=0.3, dtype=torch.float32)
    s = randomized_svd(M, 10, power_iterations=6)[1]
    assert_close(s.double(), S[:10], rtol=0.02, atol=0)


@check
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(0, 12), st.sampled_from([(), (2,), (2, 1)])
)
def test_every_shape_gives_exactly_rank_and_a_near_best_error(m, n, rank, batch):
    rank = min(rank, m, n)
    M = torch.randn(*batch, m, n, dtype=torch.float64)
    U, S, Vh = randomized_svd(M, rank)
    assert U.shape == (*batch, m, rank) and S.shape == (*batch, rank)
    assert Vh.shape == (*batch, rank, n)
    exact = torch.linalg.svdvals(M)
    error = (M - (U * S.unsqueeze(-2)) @ Vh).square().sum((-2, -1))
    tail = exact[..., rank:].square().sum(-1)
    assert bool((error <= 1.1 * tail + 1e-12).all())
    if rank + 8 >= min(m, n):
        assert_close(error, tail, atol=1e-12, rtol=1e-9)


def test_seed_decides_and_the_global_state_is_left_alone():
    M = torch.randn(60, 50)
    before = torch.get_rng_state()
    first = randomized_svd(M, 4, seed=3)
    second = randomized_svd(M, 4, seed=3)
    other = randomized_svd(M, 4, seed=4)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])
    torch.manual_seed(99)
    again = randomized_svd(M, 4, seed=3)
    assert torch.equal(first[0], again[0])


def test_a_generator_is_used_and_advanced():
    M = torch.randn(60, 50)
    one, two = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    first = randomized_svd(M, 4, generator=one)
    assert torch.equal(first[0], randomized_svd(M, 4, seed=3)[0])
    assert not torch.equal(one.get_state(), two.get_state())


@pytest.mark.parametrize("method", ["randomized", "exact"])
def test_low_rank_approximation_is_balanced_and_keeps_the_dtype(method):
    M, _, S, _ = decaying(80, 60)
    low = low_rank_approximation(M, 5, method)
    assert low.rank == 5 and low.scale == 1.0
    assert_close(low.B.mT @ low.B, torch.diag(S[:5]), rtol=1e-5, atol=1e-7)
    assert_close(low.A @ low.A.mT, torch.diag(S[:5]), rtol=1e-5, atol=1e-7)
    error = float((M - low.dense()).square().sum())
    assert error == pytest.approx(float(S[5:].square().sum()), rel=1e-4)
    assert low_rank_approximation(M.bfloat16(), 5, method).dtype == torch.bfloat16
    assert randomized_svd(M.bfloat16(), 5)[0].dtype == torch.float32


def test_errors_say_what_to_change():
    M = torch.randn(6, 5)
    with pytest.raises(ValueError, match=r"rank 6 .*\(6, 5\)"):
        randomized_svd(M, 6)
    with pytest.raises(ValueError, match=r"rank -1"):
        low_rank_approximation(M, -1, "exact")
    with pytest.raises(ValueError, match="oversample -1"):
        randomized_svd(M, 2, oversample=-1)
    with pytest.raises(ValueError, match="'fast'"):
        low_rank_approximation(M, 2, "fast")
    M[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        randomized_svd(M, 2)


@pytest.mark.parametrize("shape", [(900, 700), (700, 900), (300, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_krylov_finds_subspaces_that_power_iterations_mix(shape, dtype):
    # Neighbouring singular values 0.3 % apart, as trained weights have them; the last shape is
    # small enough for the Gram matrix.
    M, U, S, V = decaying(*shape, rate=0.997, dtype=dtype)
    u, s, vh = krylov_svd(M, 8)
    assert u.dtype == dtype and u.shape == (shape[0], 8) and vh.shape == (8, shape[1])
    assert float(principal_angles(u.double(), U[:, :8]).max()) < 1e-3
    assert float(principal_angles(vh.double().mT, V[:, :8]).max()) < 1e-3
    assert_close(s.double(), S[:8], rtol=1e-5, atol=0)
    mixed = randomized_svd(M, 8, power_iterations=4)[0]
    assert float(principal_angles(mixed.double(), U[:, :8]).max()) > 0.1


def test_krylov_leaves_the_global_random_state_and_takes_stacks():
    before = torch.get_rng_state()
    stack = torch.stack([decaying(60, 40, seed=i)[0] for i in range(3)])
    u, s, vh = krylov_svd(stack, 4, depth=2)
    assert torch.equal(torch.get_rng_state(), before)
    for part, values in zip(stack, s, strict=True):
        assert_close(values, torch.linalg.svdvals(part)[:4], rtol=1e-3, atol=0)
    assert u.shape == (3, 60, 4) and vh.shape == (3, 4, 40)
    assert krylov_svd(torch.zeros(30, 20), 3)[1].eq(0).all()
