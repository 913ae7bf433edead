"""`lora_linear`: one node that equals the dense layer, in every dtype and mode it promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import assert_agrees, make_case, measured, oracle, relative_error
from torch.utils.checkpoint import checkpoint

from plait.kernels import lora_linear, use_reference


def call(case, dropout=0.0, seed=0):
    return lora_linear(
        case.x, case.weight, case.bias, case.A, case.B, case.scale, dropout=dropout, seed=seed
    )


@settings(max_examples=60, deadline=None)
@given(
    batch=st.lists(st.integers(0, 5), min_size=0, max_size=3).map(tuple),
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 9),
    rank=st.integers(0, 5),
    bias=st.booleans(),
    strided=st.booleans(),
    train=st.sampled_from(["xAB", "xB", "B", "A", "x", "AB", "xA"]),
    dropout=st.sampled_from([0.0, 0.25, 0.3]),
)
def test_equals_the_dense_layer(batch, inputs, outputs, rank, bias, strided, train, dropout):
    case = make_case(batch, inputs, outputs, rank, bias=bias, strided=strided, train=train)
    if rank == 0:
        train = train.replace("A", "").replace("B", "")
        case.A.requires_grad_(False), case.B.requires_grad_(False)
    y = call(case, dropout, seed=5)
    expected = oracle(case, dropout, seed=5) if train else None
    if expected is None:
        assert not y.requires_grad
        return
    assert_agrees(measured(case, y), expected, 1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck(dropout):
    case = make_case()
    assert torch.autograd.gradcheck(
        lambda x, A, B: lora_linear(x, case.weight, case.bias, A, B, 0.7, dropout=dropout, seed=1),
        (case.x, case.A, case.B),
    )


def test_large_blocks_of_rows_agree_with_the_whole_mask():
    # Wide enough that the rows are walked over in several blocks, the last one ragged.
    case = make_case((301,), 640, 16, 4)
    assert_agrees(measured(case, call(case, 0.1, 9)), oracle(case, 0.1, 9), 1e-12)


@pytest.mark.parametrize(
    ("dtype", "factor_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 2e-2),
        (torch.bfloat16, torch.bfloat16, 2e-2),
        (torch.float16, torch.float32, 4e-3),
        (torch.float16, torch.float16, 4e-3),
    ],
)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_low_precision_is_within_its_rounding(dtype, factor_dtype, tolerance, dropout):
    case = make_case((4, 64), 96, 80, 8, dtype=dtype, factor_dtype=factor_dtype)
    found = measured(case, call(case, dropout, 3))
    assert found[0].dtype == found[1].dtype == dtype
    assert found[2].dtype == found[3].dtype == factor_dtype
    assert_agrees(found, oracle(case, dropout, 3), tolerance)


def test_autocast_agrees_with_plain_pytorch_under_autocast():
    case = make_case((4, 16), 32, 24, 4, dtype=torch.float32)
    results = []
    for reference in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            if reference:
                with use_reference():
                    y = call(case)
            else:
                y = call(case)
        assert y.dtype == torch.bfloat16
        results.append(measured(case, y))
        assert all(t.dtype == torch.float32 for t in results[-1][1:])
    for mine, theirs in zip(*results, strict=True):
        assert relative_error(mine, theirs) < 2e-2


def test_backward_inside_autocast_keeps_the_forward_dtype():
    case = make_case((4, 16), 32, 24, 4, dtype=torch.float32)
    y = call(case)
    with torch.autocast("cpu", torch.bfloat16):
        found = measured(case, y)
    assert_agrees(found, oracle(case), 1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("seed", [None, 11])
def test_checkpointing_recomputes_the_same_dropout(reentrant, seed):
    case = make_case((8, 16), 32, 24, 4)

    def layer(x):
        return lora_linear(
            x, case.weight, case.bias, case.A, case.B, 0.7, dropout=0.4, seed=seed
        ).tanh()

    results = []
    for wrap in (lambda x: layer(x), lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        torch.manual_seed(7)
        results.append(measured(case, wrap(case.x)))
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


def test_dropout_without_a_seed_follows_manual_seed_and_changes_with_it():
    case = make_case()
    torch.manual_seed(1)
    first = call(case, 0.5, None)
    second = call(case, 0.5, None)
    torch.manual_seed(1)
    again = call(case, 0.5, None)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_saves_x_and_u_and_no_mask():
    case = make_case((64,), 32, 48, 4, dtype=torch.float32)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call(case, 0.1, 3)
    own = {t.data_ptr() for t in (case.x, case.weight, case.A, case.B)}
    extra = [t for t in saved if t.data_ptr() not in own]
    assert [t.numel() for t in extra] == [4 * 64]  # u, and nothing of y's or the mask's size
    y.backward(case.grad)


def test_frozen_a_saves_no_x():
    case = make_case((64,), 32, 48, 4, train="xB")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(case)
    assert all(t.data_ptr() != case.x.data_ptr() for t in saved)


def test_caller_tensors_are_never_written_to():
    case = make_case((16,), 8, 8, 2)
    tensors = [case.x, case.weight, case.bias, case.A, case.B, case.grad]
    before = [t.detach().clone() for t in tensors]
    versions = [t._version for t in tensors]
    call(case, 0.2, 1).backward(case.grad)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert versions == [t._version for t in tensors]


def test_x_changed_in_place_after_forward_is_reported():
    case = make_case()
    x = case.x * 1.0
    y = lora_linear(x, case.weight, case.bias, case.A, case.B, 0.7)
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_noncontiguous_x_and_gradient():
    case = make_case((5, 4))
    expected = oracle(case)
    x = case.x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    y = lora_linear(x, case.weight, case.bias, case.A, case.B, case.scale)
    grad = case.grad.transpose(0, 1).contiguous().transpose(0, 1)
    assert not x.is_contiguous() and not grad.is_contiguous()
    y.backward(grad)
    assert_agrees([y.detach(), x.grad, case.A.grad, case.B.grad], expected, 1e-12)


def test_trained_weight_and_bias_get_their_gradients():
    case = make_case()
    weight = case.weight.requires_grad_()
    bias = case.bias.requires_grad_()
    call(case).backward(case.grad)
    flat = case.grad.reshape(-1, 7)
    assert torch.allclose(weight.grad, flat.T @ case.x.detach().reshape(-1, 6))
    assert torch.allclose(bias.grad, flat.sum(0))


def test_double_backward_works_on_the_reference_and_is_refused_on_the_fused_path():
    case = make_case()
    (first,) = torch.autograd.grad(call(case).pow(2).sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    with use_reference():
        assert torch.autograd.gradgradcheck(
            lambda x, A, B: lora_linear(x, case.weight, None, A, B, 0.7),
            (case.x, case.A, case.B),
        )


def test_per_sample_gradients_by_functorch():
    case = make_case((4,))

    def loss(A, x):
        return lora_linear(x, case.weight, case.bias, A, case.B, 0.7).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(case.A.detach(), case.x.detach())
    for x, mine in zip(case.x.detach(), per_sample, strict=True):
        A = case.A.detach().requires_grad_()
        (theirs,) = torch.autograd.grad(loss(A, x), A)
        assert torch.allclose(mine, theirs)


def test_forward_mode():
    case = make_case()
    plain = make_case()
    tangent = plain.x.detach()
    _, moved = torch.func.jvp(
        lambda x: lora_linear(x, case.weight, case.bias, case.A, case.B, 0.7),
        (case.x.detach(),),
        (tangent,),
    )
    dense = case.weight + 0.7 * case.B.detach() @ case.A.detach()
    assert torch.allclose(moved, tangent @ dense.T)


@pytest.mark.slow
def test_compiles_as_one_graph():
    case = make_case((8,), 16, 12, 4, dtype=torch.float32)

    def layer(x, A, B):
        return lora_linear(x, case.weight, case.bias, A, B, 0.7)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = measured(case, compiled(case.x, case.A, case.B))
    assert_agrees(found, oracle(case), 1e-5)


def test_without_gradients_there_is_no_node():
    case = make_case()
    with torch.no_grad():
        y = call(case)
    assert y.grad_fn is None
    assert relative_error(y, oracle(case)[0]) < 1e-12


@pytest.mark.parametrize("p", [-0.1, 1.0, 2.0])
def test_impossible_dropout_is_refused(p):
    with pytest.raises(ValueError, match="dropout must lie in"):
        call(make_case(), p)


def test_a_weight_of_another_dtype_is_refused_outside_autocast():
    case = make_case(dtype=torch.float32)
    with pytest.raises(TypeError, match=r"x is torch.bfloat16 but the weight is torch.float32"):
        lora_linear(case.x.bfloat16(), case.weight, None, case.A, case.B)
