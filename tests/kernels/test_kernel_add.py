"""`lora_add`: the additive part for opaque bases, in place only where nobody can notice."""

import pytest
import torch
from kernel_cases import Case, assert_agrees, make_case, measured, oracle

from plait.kernels import lora_add, use_reference


def base(case: Case, x=None):
    return torch.nn.functional.linear(case.x if x is None else x, case.weight, case.bias)


@pytest.mark.parametrize("train", ["xAB", "xB", "AB", "B", "x"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("inplace", [None, False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_dense_layer(train, dropout, inplace, bias):
    case = make_case(train=train, bias=bias)
    y = lora_add(
        base(case), case.x, case.A, case.B, case.scale, dropout=dropout, seed=2, inplace=inplace
    )
    assert_agrees(measured(case, y), oracle(case, dropout, 2), 1e-12)


def test_writes_into_a_fresh_y():
    case = make_case(bias=False)  # PyTorch returns a view for a biased 3-D linear on a CPU
    y = base(case)
    assert lora_add(y, case.x, case.A, case.B).data_ptr() == y.data_ptr()


@pytest.mark.parametrize("inplace", [None, True])
def test_writes_into_y_without_history_only_when_told(inplace):
    case = make_case()
    with torch.no_grad():
        y = base(case)
        kept = y.clone()
        z = lora_add(y, case.x, case.A, case.B, inplace=inplace)
    assert (z.data_ptr() == y.data_ptr()) == bool(inplace)
    assert torch.equal(y, kept) != bool(inplace)


@pytest.mark.parametrize(
    "make_y",
    [
        lambda case: base(case).tanh(),  # keeps its output for backward
        lambda case: base(case).exp(),
        lambda case: base(case)[..., :],  # a view of a tensor that others may hold
        lambda case: (case.x * 1.0).requires_grad_(),
    ],
    ids=["tanh", "exp", "view", "product"],
)
def test_bases_that_keep_their_output_are_not_disturbed(make_y):
    case = make_case(outputs=6)
    grads = []
    for reference in (False, True):
        y = make_y(case)
        if reference:
            with use_reference():
                z = lora_add(y, case.x, case.A, case.B)
        else:
            z = lora_add(y, case.x, case.A, case.B)
        grads.append(torch.autograd.grad(z.sin().sum(), (case.x, case.A, case.B)))
    for mine, theirs in zip(*grads, strict=True):
        assert torch.allclose(mine, theirs)


def test_python_functions_that_save_their_output_are_not_disturbed():
    class Exp(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = x.exp()
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0]

    case = make_case(outputs=6)
    y = Exp.apply(case.x)
    lora_add(y, case.x, case.A, case.B).sum().backward()
    expected = case.x.detach().exp() + case.B.detach().sum(0) @ case.A.detach()
    assert torch.allclose(case.x.grad, expected)


def test_an_identity_base_is_not_overwritten():
    case = make_case(outputs=6)
    x = case.x * 1.0
    before = x.detach().clone()
    lora_add(x, x, case.A, case.B)
    assert torch.equal(x, before)


def test_y_of_another_dtype_keeps_its_dtype():
    case = make_case((4, 8), 16, 12, 4, dtype=torch.float32)
    y = base(case).to(torch.bfloat16)
    z = lora_add(y, case.x, case.A, case.B, 0.7)
    assert z.dtype == torch.bfloat16
    found = measured(case, z)
    assert found[1].dtype == torch.float32
    assert_agrees(found, oracle(case), 2e-2)


def test_autocast():
    case = make_case((4, 8), 16, 12, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        z = lora_add(base(case), case.x, case.A, case.B, 0.7)
    assert z.dtype == torch.bfloat16
    assert_agrees(measured(case, z), oracle(case), 3e-2)
