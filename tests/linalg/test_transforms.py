"""Hadamard and Kronecker products against matrices written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from plait.linalg import kron_matvec, wht

check = settings(deadline=None, max_examples=30)
batches = st.sampled_from([(), (3,), (2, 1), (0,)])


def hadamard(n):
    """Entry (i, j) is -1 to the number of bits that i and j share."""
    rows = [[(-1) ** (i & j).bit_count() for j in range(n)] for i in range(n)]
    return torch.tensor(rows, dtype=torch.float64)


@check
@given(batches, st.integers(0, 9))
def test_wht_is_multiplication_by_the_hadamard_matrix(batch, bits):
    n = 2**bits
    x = torch.randn(*batch, n, dtype=torch.float64)
    assert_close(wht(x, normalize=False), x @ hadamard(n))
    assert_close(wht(x), x @ hadamard(n) / n**0.5)


def test_wht_is_its_own_inverse_over_several_blocks():
    x = torch.randn(2, 2**13, dtype=torch.float64)
    assert_close(wht(wht(x)), x)
    assert_close(wht(x).norm(dim=-1), x.norm(dim=-1))
    impulse = torch.zeros(2**13, dtype=torch.float64)
    impulse[4097] = 1
    signs = torch.tensor([(-1.0) ** (4097 & j).bit_count() for j in range(2**13)])
    assert torch.equal(wht(impulse, normalize=False), signs.double())


def test_wht_keeps_bf16_and_passes_gradients():
    x = torch.randn(3, 128).bfloat16()
    assert wht(x).dtype == torch.bfloat16
    expected = x.double() @ hadamard(128) / 128**0.5
    assert_close(wht(x).double(), expected, rtol=2**-8, atol=1e-5)
    assert torch.autograd.gradcheck(wht, torch.randn(2, 8).double().requires_grad_())


@pytest.mark.parametrize("n", [0, 3, 12, 100])
def test_wht_refuses_other_lengths(n):
    with pytest.raises(ValueError, match=f"last dimension is {n}"):
        wht(torch.zeros(2, n))


@check
@given(batches, *[st.integers(1, 5)] * 4)
def test_kron_matvec_is_the_product_with_the_written_out_matrix(batch, p, q, s, t):
    x = torch.randn(*batch, q * t, dtype=torch.float64)
    A = torch.randn(p, q, dtype=torch.float64)
    B = torch.randn(s, t, dtype=torch.float64)
    assert_close(kron_matvec(x, A, B), x @ torch.kron(A, B).mT)


def test_kron_matvec_keeps_the_dtype_and_names_wrong_sizes():
    A, B = torch.randn(2, 3), torch.randn(4, 5)
    assert kron_matvec(torch.randn(7, 15).bfloat16(), A, B).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="x has 14 columns"):
        kron_matvec(torch.randn(7, 14), A, B)
