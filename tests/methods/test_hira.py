"""HiRA: W times 1 + B A entry by entry, on every kind of site."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import plait
import tiny
from plait import kernels


def adapted(module, **options):
    torch.manual_seed(1)
    model = nn.Sequential(module).double()
    targets = ["0"]
    adapter = plait.attach(model, "hira", rank=2, targets=targets, seed=2, **options)
    tiny.scramble(adapter, 0.5)
    return model, adapter.deltas["0"]


@pytest.mark.parametrize("tokens", [3, 30], ids=["W kept", "W + dW kept"])
def test_linear_equals_the_formula_with_gradients(tokens):
    model, delta = adapted(nn.Linear(9, 6))
    x = torch.randn(tokens, 9, dtype=torch.float64, requires_grad=True)
    g = torch.randn(tokens, 6, dtype=torch.float64)
    W = model[0].weight
    want = F.linear(x, W * (1 + delta.B @ delta.A), model[0].bias)
    tensors = [x, delta.A, delta.B]
    wanted = torch.autograd.grad(want, tensors, g)
    got = model(x)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, tensors, g), wanted, strict=True):
        torch.testing.assert_close(a, b)
    with kernels.use_reference():
        torch.testing.assert_close(model(x), want)


def test_an_embedding_multiplies_the_rows_that_are_looked_up():
    model, delta = adapted(nn.Embedding(14, 6))
    tokens = torch.tensor([[3, 3, 0], [13, 1, 2]])
    table = model[0].weight * (1 + delta.B @ delta.A).t()
    want = F.embedding(tokens, table)
    torch.testing.assert_close(model(tokens), want)
    g = torch.randn_like(want)
    wanted = torch.autograd.grad(want, [delta.A, delta.B], g)
    got = torch.autograd.grad(model(tokens), [delta.A, delta.B], g)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_a_convolution_multiplies_its_kernel():
    model, delta = adapted(nn.Conv2d(4, 6, 3, groups=2))
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    kernel = model[0].weight * (1 + (delta.B @ delta.A).view(6, 2, 3, 3))
    want = F.conv2d(x, kernel, model[0].bias, groups=2)
    torch.testing.assert_close(model(x), want)


def test_the_rank_is_not_bounded_by_r():
    _, delta = adapted(nn.Linear(9, 8))
    assert torch.linalg.matrix_rank(delta.B @ delta.A) == 2
    assert torch.linalg.matrix_rank(delta.dense()) == 8


def test_a_weight_of_zero_stays_zero():
    module = nn.Linear(9, 6)
    with torch.no_grad():
        module.weight[2, 3] = 0
    _, delta = adapted(module)
    assert delta.dense()[2, 3] == 0 and (delta.dense() != 0).sum() == 9 * 6 - 1


def test_the_start_is_the_base_model_exactly_and_learns():
    model = tiny.llama()
    before = tiny.logits(model)
    adapter = plait.attach(model, "hira", rank=4, targets=["embed_tokens", "q_proj", "up_proj"])
    assert torch.equal(tiny.logits(model), before)
    sites = [d.site for d in adapter.deltas.values()]
    want = sum(4 * sum(s.shape) for s in sites)
    assert adapter.num_parameters() == adapter.method.count(sites, adapter.options) == want
    losses = tiny.losses(model, adapter, lr=3e-2)
    assert losses[-1] < 0.8 * losses[0]


def test_a_small_pattern_survives_in_half_precision():
    """W (1 + 1e-3) rounds to W in bfloat16; the change must not."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 32, bias=False)).bfloat16()
    adapter = plait.attach(model, "hira", rank=1, seed=2)
    delta = adapter.deltas["0"]
    with torch.no_grad():
        delta.A.fill_(1.0)
        delta.B.fill_(1e-3)
    x = torch.randn(100, 64).bfloat16()
    got = torch.autograd.grad(model(x).float().sum(), delta.B)[0]
    want = ((x.float().sum(0) * model[0].weight.float()).sum(1))[:, None]
    torch.testing.assert_close(got, want, rtol=0.03, atol=0.3)
    change = delta(x).float()
    torch.testing.assert_close(
        change, 1e-3 * F.linear(x, model[0].weight).float(), rtol=0.02, atol=2e-5
    )
