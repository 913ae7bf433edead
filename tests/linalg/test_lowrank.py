"""LowRank against dense float64 matrices, over shapes that include rank 0, rank > min and out 1."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from plait.linalg import LowRank

check = settings(deadline=None, max_examples=30)
batches = st.sampled_from([(), (2,), (2, 3)])
sides = st.integers(1, 9)
ranks = st.integers(0, 12)
seeds = st.integers(0, 10_000)
scales = st.sampled_from([1.0, -0.5, 2.7, 0.0])


def make(shape, rank, seed, scale=1.0, dtype=torch.float64):
    *batch, out, width = shape
    g = torch.Generator().manual_seed(seed)
    B = torch.randn(*batch, out, rank, generator=g, dtype=torch.float64)
    A = torch.randn(*batch, rank, width, generator=g, dtype=torch.float64)
    return LowRank(B.to(dtype), A.to(dtype), scale)


def oracle(x):
    return x.scale * torch.einsum("...or,...ri->...oi", x.B.double(), x.A.double())


@st.composite
def matrices(draw):
    shape = (*draw(batches), draw(sides), draw(sides))
    return make(shape, draw(ranks), draw(seeds), draw(scales))


@st.composite
def pairs(draw):
    shape = (*draw(batches), draw(sides), draw(sides))
    return tuple(make(shape, draw(ranks), draw(seeds), draw(scales)) for _ in range(2))


@check
@given(matrices())
def test_dense_shape_and_dtype(x):
    assert_close(x.dense(), oracle(x))
    assert x.shape == x.dense().shape
    assert x.dense(torch.float32).dtype == torch.float32
    assert x.rank == x.A.shape[-2] and x.dtype == torch.float64 and x.device.type == "cpu"


@check
@given(pairs(), st.floats(-3, 3))
def test_arithmetic_is_that_of_the_dense_matrices(pair, factor):
    x, y = pair
    X, Y = oracle(x), oracle(y)
    assert_close(oracle(x + y), X + Y)
    assert_close(oracle(x - y), X - Y)
    assert_close(oracle(-x), -X)
    assert_close(oracle(factor * x), factor * X)
    assert_close(oracle(x * factor), factor * X)
    assert_close(oracle(LowRank.weighted_sum([x, y, x], [0.3, factor, -2])), factor * Y - 1.7 * X)
    assert (x + y).rank == x.rank + y.rank


@check
@given(pairs())
def test_inner_norm_and_cosine(pair):
    x, y = pair
    X, Y = oracle(x), oracle(y)
    assert_close(x.inner(y), (X * Y).sum((-2, -1)))
    assert_close(x.norm(), X.square().sum((-2, -1)).sqrt())
    lengths = X.norm(dim=(-2, -1)) * Y.norm(dim=(-2, -1))
    expected = torch.where(lengths > 0, (X * Y).sum((-2, -1)) / lengths, 0)
    assert_close(x.cosine(y), expected)
    assert x.norm().shape == x.shape[:-2]


@check
@given(matrices())
def test_svd_reconstructs_with_orthonormal_vectors(x):
    U, S, Vh = x.svd()
    k = min(x.rank, *x.shape[-2:])
    assert S.shape == (*x.shape[:-2], k)
    assert_close((U * S.unsqueeze(-2)) @ Vh, oracle(x))
    eye = torch.eye(k, dtype=torch.float64).expand(*x.shape[:-2], k, k)
    assert_close(U.mT @ U, eye)
    assert_close(Vh @ Vh.mT, eye)
    expected = torch.linalg.svdvals(oracle(x))[..., :k]
    assert_close(S, expected)
    assert_close(x.singular_values(), expected)


@check
@given(matrices(), st.integers(0, 12))
def test_truncate_error_is_the_tail_energy(x, rank):
    kept, dropped = x.truncate(rank=rank)
    X = oracle(x)
    tail = torch.linalg.svdvals(X)[..., rank:].square().sum(-1)
    assert_close((X - oracle(kept)).square().sum((-2, -1)), tail, atol=1e-12, rtol=1e-9)
    total = float(X.square().sum())
    assert dropped == pytest.approx(float(tail.sum()) / total if total else 0.0, abs=1e-12)
    assert kept.rank == min(rank, x.rank, *x.shape[-2:])
    assert type(dropped) is float


@check
@given(matrices(), st.floats(0.01, 1.0))
def test_truncate_keeps_the_fewest_values_that_hold_the_energy(x, energy):
    kept, dropped = x.truncate(energy=energy)
    squares = torch.linalg.svdvals(oracle(x)).square().reshape(-1, min(x.shape[-2:]))
    needed = 0
    for row in squares.tolist():
        total, held, k = sum(row), 0.0, 0
        while total > 1e-20 and held < energy * total * (1 - 1e-12):
            held, k = held + row[k], k + 1
        needed = max(needed, k)
    assert kept.rank == needed
    assert dropped <= 1 - energy + 1e-12


def test_full_energy_finds_the_numerical_rank():
    x = make((30, 20), 4, 0, dtype=torch.float32)
    doubled = x + x
    kept, dropped = doubled.truncate(energy=1.0)
    assert doubled.rank == 8 and kept.rank == 4
    assert dropped < 1e-12
    # A sum that cancels leaves values of 1e-6 of the first, which are rounding, not rank.
    y, z = (make((100, 80), 4, seed, dtype=torch.float32) for seed in (1, 2))
    cancelled = LowRank.weighted_sum([y, z, y], [1, 0.3, -1])
    assert cancelled.rank == 12 and cancelled.truncate(energy=1.0)[0].rank == 4
    assert kept.truncate(rank=3, energy=1.0)[0].rank == 3
    assert kept.truncate(rank=4, energy=1e-6)[0].rank == 1


@check
@given(matrices())
def test_balanced_splits_the_spectrum_evenly(x):
    even = x.balanced()
    assert_close(oracle(even), oracle(x))
    assert even.scale == 1.0
    S = torch.diag_embed(x.singular_values())
    assert_close(even.B.mT @ even.B, S)
    assert_close(even.A @ even.A.mT, S)


@check
@given(matrices())
def test_effective_rank_is_the_exponential_of_the_entropy(x):
    for value, S in zip(
        x.effective_rank().reshape(-1).tolist(),
        torch.linalg.svdvals(oracle(x)).reshape(-1, min(x.shape[-2:])).tolist(),
        strict=True,
    ):
        p = [s / sum(S) for s in S if s > 1e-14] if sum(S) > 1e-14 else []
        expected = math.exp(-sum(q * math.log(q) for q in p)) if p else 0.0
        assert value == pytest.approx(expected, abs=1e-9)


def test_effective_rank_of_a_flat_and_of_a_single_spectrum():
    eye = torch.eye(5, dtype=torch.float64)
    assert float(LowRank(eye, eye).effective_rank()) == pytest.approx(5)
    assert float(make((6, 7), 1, 0).effective_rank()) == pytest.approx(1)


@check
@given(matrices(), st.integers(0, 4))
def test_matmul_of_vectors_and_token_batches(x, tokens):
    g = torch.Generator().manual_seed(1)
    inputs = torch.randn(tokens, x.shape[-1], generator=g, dtype=torch.float64)
    assert_close(x.matmul(inputs), inputs @ oracle(x).mT)
    if x.B.ndim == 2:
        vector = torch.ones(x.shape[-1], dtype=torch.float64)
        assert_close(x.matmul(vector), oracle(x) @ vector)


@check
@given(matrices(), st.data())
def test_rows_columns_and_transpose(x, data):
    X = oracle(x)
    for select, size, dim in ((x.rows, x.shape[-2], -2), (x.columns, x.shape[-1], -1)):
        i = data.draw(st.integers(-size, size - 1))
        picked = data.draw(st.lists(st.integers(0, size - 1), max_size=4))
        a, b = sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))
        index = torch.tensor(picked, dtype=torch.long)
        assert_close(oracle(select(i)), X.index_select(dim, torch.tensor([i % size])))
        assert_close(oracle(select(picked)), X.index_select(dim, index))
        assert_close(oracle(select(index)), X.index_select(dim, index))
        assert_close(oracle(select(slice(a, b))), X.narrow(dim, a, b - a))
        mask = torch.arange(size) % 2 == 0
        assert_close(oracle(select(mask)), X.index_select(dim, mask.nonzero().flatten()))
        with pytest.raises(IndexError):
            select(size)
    assert_close(oracle(x.transpose()), X.mT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_results_keep_the_dtype_and_are_computed_in_float32(dtype):
    x, y = make((12, 10), 3, 0, 1.5, dtype), make((12, 10), 2, 1, 0.7, dtype)
    tokens = torch.randn(4, 10).to(dtype)
    results = [x + y, x - y, 2 * x, -x, x.rows(2), x.transpose(), x.balanced()]
    results += [x.truncate(rank=2)[0], x.truncate(energy=0.9)[0]]
    assert {r.dtype for r in results} == {dtype}
    assert x.dense().dtype == dtype and x.matmul(tokens).dtype == dtype
    assert {t.dtype for t in (*x.svd(), x.norm(), x.inner(y), x.cosine(y))} == {torch.float32}
    # One rounding of a result computed in float32: within an ulp of the exact value.
    rounding = {"rtol": torch.finfo(dtype).eps, "atol": 1e-5}
    assert_close(x.dense().double(), oracle(x), **rounding)
    assert_close(x.matmul(tokens).double(), tokens.double() @ oracle(x).mT, **rounding)
    assert_close(x.norm().double(), oracle(x).norm(), rtol=1e-6, atol=0)


def test_equal_scales_and_differences_concatenate_without_rounding():
    x, y = (make((8, 8), 3, seed, 0.3, torch.bfloat16) for seed in (0, 1))
    for total, B in ((x + y, y.B), (x - y, -y.B)):
        assert total.scale == 0.3
        assert torch.equal(total.B, torch.cat([x.B, B], -1))
        assert torch.equal(total.A, torch.cat([x.A, y.A], -2))


def test_to_moves_dtype_and_keeps_scale():
    x = make((4, 5), 2, 0, 3.0)
    low = x.to(dtype=torch.bfloat16)
    assert low.dtype == torch.bfloat16 and low.scale == 3.0 and x.to("cpu").dtype == x.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norm_survives_cancellation(dtype):
    x = make((50, 40), 6, 0, dtype=dtype)
    assert float((x - x).norm()) <= 1e-13 * float(x.norm())
    step = make((50, 40), 1, 1, dtype=dtype)
    near = LowRank.weighted_sum([x, step, x], [1, 1e-9, -1])
    expected = 1e-9 * float(oracle(step).norm())
    assert float(near.norm()) == pytest.approx(expected, rel=1e-5)


def test_norm_and_matmul_are_differentiable():
    B, A = torch.randn(5, 2).double().requires_grad_(), torch.randn(2, 4).double().requires_grad_()
    tokens = torch.randn(3, 4).double()
    assert torch.autograd.gradcheck(lambda B, A: LowRank(B, A, 0.5).norm(), (B, A))
    assert torch.autograd.gradcheck(lambda B, A: LowRank(B, A, 0.5).matmul(tokens), (B, A))


@pytest.mark.parametrize("name", ["B", "A"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_are_named(name, bad):
    x = make((6, 5), 2, 0)
    getattr(x, name)[0, 0] = bad
    calls = [x.svd, x.singular_values, x.balanced, lambda: x.truncate(rank=1)]
    for call in calls:
        with pytest.raises(ValueError, match=f"factor {name} .*NaN or infinity"):
            call()
    with pytest.raises(ValueError, match="scale is nan"):
        (make((6, 5), 2, 0) * math.nan).svd()


def test_errors_name_the_shapes():
    x, y = make((6, 5), 2, 0), make((6, 4), 2, 0)
    ways = [lambda: x + y, lambda: x - y, lambda: x.inner(y), lambda: x.cosine(y)]
    for way in ways:
        with pytest.raises(ValueError, match=r"\(6, 5\) and \(6, 4\)"):
            way()
    with pytest.raises(ValueError, match=r"B \(3, 2\) and A \(4, 5\)"):
        LowRank(torch.zeros(3, 2), torch.zeros(4, 5))
    with pytest.raises(ValueError, match="bfloat16"):
        LowRank(torch.zeros(3, 2, dtype=torch.bfloat16), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="int64"):
        LowRank(torch.zeros(3, 2, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="2 items and 1 weights"):
        LowRank.weighted_sum([x, x], [1.0])
    with pytest.raises(ValueError, match="0 items"):
        LowRank.weighted_sum([], [])
    with pytest.raises(ValueError, match=r"x \(3,\)"):
        x.matmul(torch.zeros(3))
    with pytest.raises(ValueError, match=r"x \(5,\)"):
        make((2, 6, 5), 2, 0).matmul(torch.zeros(5))
    with pytest.raises(TypeError):
        x + 1


@pytest.mark.parametrize(
    "arguments", [{}, {"rank": -1}, {"energy": 0.0}, {"energy": 1.5}, {"energy": math.nan}]
)
def test_truncate_refuses_impossible_arguments(arguments):
    with pytest.raises(ValueError, match=r"LowRank\.truncate"):
        make((6, 5), 2, 0).truncate(**arguments)


def test_is_immutable_and_prints_no_tensors():
    x = make((6, 5), 2, 0)
    with pytest.raises(AttributeError):
        x.scale = 2.0
    assert repr(x) == "LowRank(6 x 5, rank=2, scale=1, torch.float64)"


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (3, 40, 60)])
@pytest.mark.parametrize("fall", [0.0, 0.15])
def test_a_deep_cut_takes_the_short_way_and_is_the_same(shape, fall: float) -> None:
    g = torch.Generator().manual_seed(0)
    *batch, out, columns = shape
    B = torch.randn(*batch, out, 24, generator=g) * torch.exp(-fall * torch.arange(24))
    low = LowRank(B, torch.randn(*batch, 24, columns, generator=g), 1.7)
    kept, dropped = low.truncate(rank=5)
    U, S, Vh = torch.linalg.svd(low.dense(torch.float64), full_matrices=False)
    best = (U[..., :5] * S[..., None, :5]) @ Vh[..., :5, :]
    error = (kept.dense(torch.float64) - best).norm() / best.norm()
    assert float(error) < 1e-6
    assert dropped == pytest.approx(float(S[..., 5:].square().sum() / S.square().sum()), rel=1e-5)
    assert kept.rank == 5


def test_a_cut_through_numbers_that_a_gram_matrix_loses_takes_the_long_way() -> None:
    g = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -9, 12, dtype=torch.float64)
    B = torch.linalg.qr(torch.randn(30, 12, generator=g, dtype=torch.float64)).Q * scales
    A = torch.linalg.qr(torch.randn(40, 12, generator=g, dtype=torch.float64)).Q.mT
    kept, _ = LowRank(B, A).truncate(rank=4)
    S = torch.linalg.svdvals(kept.dense())
    torch.testing.assert_close(S[:4], scales[:4], rtol=1e-6, atol=0)
    copies = LowRank(torch.cat([B, B, B], 1), torch.cat([A, A, A]))
    torch.testing.assert_close(
        copies.truncate(rank=4)[0].dense(), 3 * kept.dense(), atol=1e-9, rtol=0
    )
