"""`lora_linear_group`: the members' separate results, from one node that keeps one x."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import relative_error
from torch.utils.checkpoint import checkpoint

from plait.kernels import lora_linear, lora_linear_group, use_reference

SCALES = [0.5, 1.0, 2.0]


def make_group(ranks, widths, inputs=6, batch=(3, 4), dtype=torch.float64, factor_dtype=None):
    factor_dtype = factor_dtype or dtype
    x = torch.randn(*batch, inputs, dtype=dtype, requires_grad=True)
    weights = [torch.randn(o, inputs, dtype=dtype) for o in widths]
    biases = [None if o % 2 else torch.randn(o, dtype=dtype) for o in widths]
    As = [
        None if r is None else torch.randn(r, inputs, dtype=factor_dtype, requires_grad=True)
        for r in ranks
    ]
    Bs = [
        None if r is None else torch.randn(o, r, dtype=factor_dtype, requires_grad=True)
        for o, r in zip(widths, ranks, strict=True)
    ]
    return x, weights, biases, As, Bs


def gradients(outputs, leaves, skip=()):
    torch.manual_seed(3)
    loss = sum(
        (y * torch.randn(y.shape, dtype=torch.float64).to(y.dtype)).sum()
        for i, y in enumerate(outputs)
        if i not in skip
    )
    return torch.autograd.grad(loss, leaves, allow_unused=True)


def separate(x, weights, biases, As, Bs, **options):
    return [
        torch.nn.functional.linear(x, W, b)
        if A is None
        else lora_linear(x, W, b, A, B, s, **options)
        for W, b, A, B, s in zip(weights, biases, As, Bs, SCALES, strict=False)
    ]


@settings(max_examples=40, deadline=None)
@given(
    members=st.lists(
        st.tuples(st.sampled_from([None, 0, 1, 2, 5]), st.integers(1, 7)), min_size=1, max_size=3
    ),
    batch=st.lists(st.integers(0, 4), max_size=2).map(tuple),
    dropout=st.sampled_from([0.0, 0.3]),
    data=st.data(),
)
def test_equals_separate_calls(members, batch, dropout, data):
    skip = data.draw(st.sets(st.integers(0, len(members) - 1), max_size=len(members) - 1))
    ranks, widths = zip(*members, strict=True)
    group = make_group(ranks, widths, batch=batch)
    leaves = [group[0], *(t for t in (*group[3], *group[4]) if t is not None and t.numel())]
    scales = SCALES[: len(members)]
    together = lora_linear_group(*group, scales, dropout=dropout, seed=6)
    alone = separate(*group, dropout=dropout, seed=6)
    for mine, theirs in zip(together, alone, strict=True):
        assert relative_error(mine.detach(), theirs.detach()) < 1e-12
    pairs = zip(gradients(together, leaves, skip), gradients(alone, leaves, skip), strict=True)
    for mine, theirs in pairs:
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert relative_error(mine, theirs) < 1e-12


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck(dropout):
    x, weights, biases, As, Bs = make_group([2, 1, 3], [4, 3, 5])
    assert torch.autograd.gradcheck(
        lambda x, *f: lora_linear_group(
            x, weights, biases, f[:3], f[3:], SCALES, dropout=dropout, seed=2
        ),
        (x, *As, *Bs),
    )


def test_frozen_a_gets_no_gradient_and_saves_no_x():
    x, weights, biases, As, Bs = make_group([2, 2, 2], [4, 3, 5])
    for A in As:
        A.requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        outputs = lora_linear_group(x, weights, biases, As, Bs, SCALES)
    assert all(t.data_ptr() != x.data_ptr() for t in saved)
    found = gradients(outputs, [x, *Bs])
    with use_reference():
        expected = gradients(lora_linear_group(x, weights, biases, As, Bs, SCALES), [x, *Bs])
    for mine, theirs in zip(found, expected, strict=True):
        assert relative_error(mine, theirs) < 1e-12


def test_saves_x_once_and_one_u():
    x, weights, biases, As, Bs = make_group([2, 2, 2], [4, 3, 5], batch=(32,))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear_group(x, weights, biases, As, Bs, SCALES, dropout=0.3, seed=1)
    own = {t.data_ptr() for t in (*weights, *As, *Bs)}
    sizes = sorted(t.numel() for t in saved if t.data_ptr() not in own)
    assert sizes == [32 * 6, 32 * 6]  # x [32, 6] and u [6, 32]


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_bf16_is_within_its_rounding_of_float64(factor_dtype, dropout):
    group = make_group([8, 8, 8], [64, 32, 32], 48, (64,), torch.bfloat16, factor_dtype)
    exact = [
        t if t is None else t.detach().double().requires_grad_(t.requires_grad)
        for part in ([group[0]], *group[1:])
        for t in part
    ]
    wide = (exact[0], exact[1:4], exact[4:7], exact[7:10], exact[10:])
    found = gradients(
        lora_linear_group(*group, SCALES, dropout=dropout, seed=1), [group[0], *group[3], *group[4]]
    )
    with use_reference():
        expected = gradients(
            lora_linear_group(*wide, SCALES, dropout=dropout, seed=1),
            [wide[0], *wide[3], *wide[4]],
        )
    for mine, theirs in zip(found, expected, strict=True):
        assert relative_error(mine, theirs) < 3e-2
    assert all(t.dtype == factor_dtype for t in found[1:])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same_dropout(reentrant):
    x, weights, biases, As, Bs = make_group([2, 2, 2], [4, 3, 5])

    def layer(x):
        q, k, v = lora_linear_group(x, weights, biases, As, Bs, SCALES, dropout=0.4)
        return q.sum(-1) * k.sum(-1) + v.sum(-1)

    results = []
    for wrap in (lambda x: layer(x), lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        torch.manual_seed(7)
        wrap(x).sum().backward()
        leaves = [x, *As, *Bs]
        results.append([t.grad for t in leaves])
        for t in leaves:
            t.grad = None
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


def test_autocast_returns_parameter_dtypes():
    x, weights, biases, As, Bs = make_group([2, 2, 2], [4, 3, 5], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = lora_linear_group(x, weights, biases, As, Bs, SCALES)
        with use_reference():
            expected = lora_linear_group(x, weights, biases, As, Bs, SCALES)
    for mine, theirs in zip(outputs, expected, strict=True):
        assert mine.dtype == theirs.dtype == torch.bfloat16
        assert relative_error(mine.detach(), theirs.detach()) < 2e-2
    assert all(g.dtype == torch.float32 for g in gradients(outputs, [x, *As, *Bs]))


@pytest.mark.slow
def test_compiles_as_one_graph():
    x, weights, biases, As, Bs = make_group([2, 2, 2], [4, 3, 5], dtype=torch.float32)

    def layer(x, *f):
        return lora_linear_group(x, weights, biases, f[:3], f[3:], SCALES)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    leaves = [x, *As, *Bs]
    found = gradients(compiled(x, *As, *Bs), leaves)
    for mine, theirs in zip(found, gradients(layer(x, *As, *Bs), leaves), strict=True):
        assert relative_error(mine, theirs) < 1e-5
