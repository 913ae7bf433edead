"""At a high rank a CPU runs x (W + s B A)^T as one product: the same values, and when it pays."""

import pytest
import torch
from kernel_cases import assert_agrees, make_case, measured, oracle

from plait.kernels import lora_linear, lora_linear_group
from plait.kernels._lowrank import FOLD_RANK, fold_plan


def plan(case, dropped=None):
    return fold_plan(case.x, [case.weight], [case.A], dropped)


# tokens, in, out, and what the plan must say: the sum kept, the sum for the forward pass alone
# (out is larger than the number of tokens), no sum.
SHAPES = [(64, 24, 40, (True, True)), (64, 24, 80, (True, False)), (16, 24, 40, (False, False))]


@pytest.mark.parametrize("train", ["xAB", "xB", "AB", "x", "A"])
@pytest.mark.parametrize(("tokens", "inputs", "outputs", "planned"), SHAPES)
def test_equals_the_dense_layer(tokens, inputs, outputs, planned, train):
    case = make_case((2, tokens // 2), inputs, outputs, FOLD_RANK, train=train)
    assert plan(case) == planned
    y = lora_linear(case.x, case.weight, case.bias, case.A, case.B, case.scale)
    assert_agrees(measured(case, y), oracle(case), 1e-12)


@pytest.mark.parametrize(("tokens", "inputs", "outputs", "planned"), SHAPES)
def test_a_group_equals_its_members(tokens, inputs, outputs, planned):
    cases = [make_case((tokens,), inputs, outputs - i, FOLD_RANK + i) for i in range(3)]
    x = cases[0].x
    for case in cases[1:]:
        case.x = x
    weights, As = [c.weight for c in cases], [c.A for c in cases]
    assert fold_plan(x, weights, As, None) == planned
    outputs_ = lora_linear_group(
        x, weights, [c.bias for c in cases], As, [c.B for c in cases], [c.scale for c in cases]
    )
    expected = [oracle(case) for case in cases]
    torch.autograd.backward(outputs_, [case.grad for case in cases])
    torch.testing.assert_close(x.grad, sum(e[1] for e in expected), rtol=1e-10, atol=1e-10)
    for case, y, wanted in zip(cases, outputs_, expected, strict=True):
        found = [y.detach(), None, case.A.grad, case.B.grad]
        assert_agrees(found, [wanted[0], None, *wanted[2:]], 1e-12)


def test_never_where_the_sum_would_round_the_change_away():
    half = make_case((64,), 24, 40, FOLD_RANK, dtype=torch.bfloat16)
    assert plan(half) == (False, False)
    assert plan(make_case((64,), 24, 40, FOLD_RANK - 1)) == (False, False)
    assert plan(make_case((64,), 24, 40, FOLD_RANK), dropped=object()) == (False, False)
