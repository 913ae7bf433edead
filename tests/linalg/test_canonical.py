"""The SVD whose signs are fixed: it is one, and the same for the same matrix."""

import pytest
import torch
from torch.testing import assert_close

from plait.linalg import canonical_svd

shapes = pytest.mark.parametrize("shape", [(5, 7), (7, 5), (3, 4, 6)], ids=str)


@shapes
def test_factors_multiply_back_and_are_orthonormal(shape):
    M = torch.randn(*shape)
    U, S, Vh = canonical_svd(M)
    assert U.dtype == S.dtype == Vh.dtype == torch.float64
    assert_close((U * S.unsqueeze(-2)) @ Vh, M.double())
    eye = torch.eye(S.shape[-1], dtype=torch.float64).expand(*S.shape, -1)
    assert_close(U.mT @ U, eye)
    assert_close(Vh @ Vh.mT, eye)
    assert_close(S, torch.linalg.svdvals(M.double()))


@shapes
def test_signs_do_not_depend_on_those_that_the_solver_happens_to_give(shape, monkeypatch):
    M = torch.randn(*shape)
    wanted = canonical_svd(M)
    svd = torch.linalg.svd

    def flipped(*args, **options):
        U, S, Vh = svd(*args, **options)
        signs = 1.0 - 2.0 * (torch.arange(S.shape[-1]) % 2)
        return U * signs, S, signs[:, None] * Vh

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    for ours, value in zip(canonical_svd(M), wanted, strict=True):
        assert_close(ours, value)
    U = wanted[0]
    assert bool((U.gather(-2, U.abs().argmax(-2, keepdim=True)) > 0).all())
