"""`multi_lora_`: every row takes its own adapter, whatever the order, ranks and strategy."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import relative_error

from plait.kernels import multi_lora_, pack_factors, plan_rows, use_reference
from plait.kernels.multi import concatenate

INPUTS, OUTPUTS = 6, 5


def make_factors(ranks, dtype=torch.float64, grad=True):
    As = [torch.randn(r, INPUTS, dtype=dtype, requires_grad=grad) for r in ranks]
    Bs = [torch.randn(OUTPUTS, r, dtype=dtype, requires_grad=grad) for r in ranks]
    return As, Bs, [0.5 + i for i in range(len(ranks))]


def row_by_row(y, x, ids, As, Bs, scales):
    """The oracle: one dense product a row."""
    rows = []
    for t, i in enumerate(ids.tolist()):
        rows.append(y[t] if i < 0 else y[t] + scales[i] * Bs[i] @ (As[i] @ x[t]))
    return torch.stack(rows)


@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.integers(-1, 3), min_size=1, max_size=24),
    ranks=st.lists(st.integers(0, 4), min_size=4, max_size=4),
    runs=st.booleans(),
)
def test_equals_a_loop_over_rows_with_gradients(ids, ranks, runs):
    ids = torch.tensor(sorted(ids) if runs else ids)
    As, Bs, scales = make_factors(ranks)
    x = torch.randn(len(ids), INPUTS, dtype=torch.float64, requires_grad=True)
    base = torch.randn(len(ids), OUTPUTS, dtype=torch.float64, requires_grad=True)
    plan = plan_rows(ids, 4)
    weights = torch.randn(len(ids), OUTPUTS, dtype=torch.float64)
    leaves = [base, x, *(t for t in (*As, *Bs) if t.numel())]
    results = []
    for y in (
        multi_lora_(base * 1.0, x, plan, As, Bs, scales),
        row_by_row(base, x, ids, As, Bs, scales),
    ):
        loss = (y * weights).sum()
        results.append((y, *torch.autograd.grad(loss, leaves, allow_unused=True)))
    for mine, theirs in zip(*results, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert relative_error(mine.detach(), theirs.detach()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [8, 300])
@pytest.mark.parametrize("keep_packed", [False, True])
@pytest.mark.parametrize("layout", ["mixed", "runs", "one", "none"])
@pytest.mark.parametrize("concatenated", [False, True])
def test_inference_equals_the_loop_whatever_the_strategy(
    monkeypatch, dtype, tokens, keep_packed, layout, concatenated
):
    monkeypatch.setattr("plait.kernels.multi.concatenate", lambda *_: concatenated)
    ids = {
        "mixed": torch.randint(-1, 6, (tokens,)),
        "runs": torch.arange(tokens) * 6 // tokens,
        "one": torch.full((tokens,), 2),
        "none": torch.full((tokens,), -1),
    }[layout]
    As, Bs, scales = make_factors([1, 2, 3, 4, 5, 0], dtype, grad=False)
    x, y = torch.randn(tokens, INPUTS).to(dtype), torch.randn(tokens, OUTPUTS).to(dtype)
    plan = plan_rows(ids, 6)
    expected = row_by_row(*(t.double() for t in (y, x)), ids, [A.double() for A in As],
                          [B.double() for B in Bs], scales)  # fmt: skip
    packed = (
        pack_factors(plan.active, As, Bs, scales, dtype) if keep_packed and plan.active else None
    )
    found = multi_lora_(y, x, plan, As, Bs, scales, packed=packed)
    assert found is y
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert relative_error(found, expected) < tolerance


def test_one_product_is_chosen_for_small_half_precision_batches_only():
    decode, prefill = 2 * 240 * 64 * 1152, 2 * 240 * 2048 * 1152  # 8 adapters, 64 and 2048 rows
    assert concatenate(torch.bfloat16, decode, 8)
    assert not concatenate(torch.bfloat16, prefill, 8)
    assert not concatenate(torch.float32, decode, 8)


def test_reference_agrees():
    ids = torch.tensor([0, 2, -1, 1, 1, 0])
    As, Bs, scales = make_factors([2, 1, 3])
    x, y = torch.randn(6, INPUTS).double(), torch.randn(6, OUTPUTS).double()
    plan = plan_rows(ids, 3)
    with use_reference():
        found = multi_lora_(y, x, plan, As, Bs, scales)
    assert torch.allclose(found, row_by_row(y, x, ids, As, Bs, scales))


def test_a_plan_of_runs_needs_no_sorting():
    plan = plan_rows(torch.tensor([2, 2, 2, -1, 0, 0, 2]), 3)
    assert plan.order is None
    assert plan.active == (0, 2)
    assert plan.spans == ((2, 0, 3), (0, 4, 6), (2, 6, 7))


def test_a_scattered_plan_is_sorted_and_leaves_bare_rows_out():
    ids = torch.tensor([1, 0, 1, -1, 0, 1, 0, -1])
    plan = plan_rows(ids, 2)
    assert plan.spans == ((0, 0, 3), (1, 3, 6))
    assert plan.order.tolist() == [1, 4, 6, 0, 2, 5]


@pytest.mark.parametrize("ids", [[0, 3], [-2, 0]])
def test_ids_out_of_range_are_refused(ids):
    with pytest.raises(ValueError, match="ids must lie in"):
        plan_rows(torch.tensor(ids), 3)


def test_ids_must_be_a_vector_of_integers():
    with pytest.raises(ValueError, match="vector of integers"):
        plan_rows(torch.zeros(3), 3)
    with pytest.raises(ValueError, match="vector of integers"):
        plan_rows(torch.zeros(3, 1, dtype=torch.long), 3)


def test_bf16_base_with_fp32_factors_trains():
    ids = torch.tensor([0, 1, 0, 1, 1, -1])
    As, Bs, scales = make_factors([2, 2], torch.float32)
    x = torch.randn(6, INPUTS).bfloat16().requires_grad_()
    y = multi_lora_(torch.zeros(6, OUTPUTS).bfloat16(), x, plan_rows(ids, 2), As, Bs, scales)
    y.float().sum().backward()
    wide = [t.detach().double().requires_grad_() for t in (x, *As, *Bs)]
    row_by_row(
        torch.zeros(6, OUTPUTS).double(), wide[0], ids, wide[1:3], wide[3:], scales
    ).sum().backward()
    for mine, theirs in zip((x, *As, *Bs), wide, strict=True):
        assert mine.grad.dtype == mine.dtype
        assert relative_error(mine.grad, theirs.grad) < 3e-2
