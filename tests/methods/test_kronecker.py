"""Kronecker sums on activations against torch.kron, and the cutting of sides."""

import pytest
import torch
from torch.autograd import gradcheck

from plait import kernels
from plait.methods._kronecker import from_blocks, kron_add, kron_apply, kron_dense, to_blocks
from plait.methods._modes import near_factors, split_side

SHAPES = [(1, 2, 3, 4, 5), (3, 4, 2, 3, 6), (2, 1, 7, 5, 1)]  # K, m, n, p, q


def factors(K, m, n, p, q):
    left = torch.randn(K, m, n, dtype=torch.float64, requires_grad=True)
    right = torch.randn(K, p, q, dtype=torch.float64, requires_grad=True)
    return left, right


@pytest.mark.parametrize("shape", SHAPES)
def test_sum_equals_torch_kron(shape):
    left, right = factors(*shape)
    wanted = sum(torch.kron(a, b) for a, b in zip(left, right, strict=True))
    torch.testing.assert_close(kron_dense(left, right), wanted)
    x = torch.randn(2, 3, wanted.shape[1], dtype=torch.float64)
    y = torch.randn(2, 3, wanted.shape[0], dtype=torch.float64)
    torch.testing.assert_close(kron_apply(x, left, right, 0.5), 0.5 * x @ wanted.t())
    torch.testing.assert_close(kron_add(y, x, left, right, 0.5), y + 0.5 * x @ wanted.t())
    with kernels.use_reference():
        torch.testing.assert_close(kron_add(y, x, left, right, 0.5), y + 0.5 * x @ wanted.t())


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_derivatives(shape):
    left, right = factors(*shape)
    x = torch.randn(3, left.shape[2] * right.shape[2], dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, left.shape[1] * right.shape[1], dtype=torch.float64, requires_grad=True)
    gradcheck(lambda *a: kron_add(*a, 0.7), (y, x, left, right))
    gradcheck(lambda *a: kron_apply(*a, 0.7), (x, left, right))


def test_only_the_input_is_kept_for_backward():
    left, right = factors(3, 4, 2, 3, 6)
    x = torch.randn(50, 12, dtype=torch.float64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        kron_apply(x, left, right)
    assert sum(kept) == x.numel() + left.numel() + right.numel()


def test_a_kronecker_product_is_one_row_of_blocks_times_another():
    left, right = factors(1, 4, 2, 3, 6)
    blocks = to_blocks(kron_dense(left, right), 4, 2)
    torch.testing.assert_close(blocks, left.reshape(-1, 1) @ right.reshape(1, -1))
    torch.testing.assert_close(from_blocks(blocks, (4, 2), (3, 6)), torch.kron(left[0], right[0]))


def test_half_precision_input_keeps_its_dtype():
    left, right = factors(1, 2, 3, 4, 5)
    x = torch.randn(6, 15).bfloat16()
    y = torch.randn(6, 8)
    assert kron_apply(x, left, right).dtype == torch.bfloat16
    assert kron_add(y, x, left, right).dtype == torch.float32


@pytest.mark.parametrize(
    ("size", "wanted", "found"),
    [(128, -1, (8, 16)), (127, -1, (1, 127)), (256, -1, (16, 16)), (128, 4, (4, 32))],
)
def test_near_factors(size, wanted, found):
    assert near_factors(size, wanted) == found


def test_near_factors_are_peft_s():
    from peft.tuners.lokr.layer import factorization

    for size in range(1, 130):
        for wanted in (-1, 2, 5, 8, 16, 200):
            assert near_factors(size, wanted) == tuple(factorization(size, wanted)), (size, wanted)


@pytest.mark.parametrize(
    ("size", "count", "found"),
    [
        (4096, 2, (64, 64)),
        (4096, 3, (16, 16, 16)),
        (13, 2, (13, 1)),
        (576, 2, (24, 24)),
        (1, 1, (1,)),
    ],
)
def test_split_side(size, count, found):
    assert split_side(size, count) == found
