"""The linear whose dW is made, multiplied and dropped: every way in which it can be called."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from plait import kernels
from plait.methods._folded import folded_linear


class Outer:
    """dW = a b^T, and a count of how often it is made."""

    def __init__(self):
        self.made = 0

    def make(self, a, b):
        self.made += 1
        return torch.outer(a, b)

    def pull(self, G, a, b):
        return G @ b, G.t() @ a


def tensors(tokens, dtype=torch.float64):
    torch.manual_seed(0)
    x, W, bias, a, b = (
        torch.randn(*shape, dtype=dtype) for shape in ((2, tokens, 5), (4, 5), (4,), (4,), (5,))
    )
    return x.requires_grad_(), W, bias, a.requires_grad_(), b.requires_grad_()


@pytest.mark.parametrize("tokens", [1, 20], ids=["made again", "kept"])
@pytest.mark.parametrize("parts", ["weight and bias", "weight", "alone"])
def test_output_and_gradients(tokens, parts):
    x, W, bias, a, b = tensors(tokens)
    given = {"weight and bias": (W, bias), "weight": (W, None), "alone": (None, None)}[parts]
    total = torch.outer(a, b) + (0 if given[0] is None else W)
    want = F.linear(x, total, given[1])
    g = torch.randn_like(want)
    change = Outer()
    got = folded_linear(x, change, (a, b), *given)
    torch.testing.assert_close(got, want)
    wanted = torch.autograd.grad(want, [x, a, b], g)
    for p, q in zip(torch.autograd.grad(got, [x, a, b], g), wanted, strict=True):
        torch.testing.assert_close(p, q)
    assert change.made == (2 if tokens == 1 else 1)
    with kernels.use_reference():
        torch.testing.assert_close(folded_linear(x, change, (a, b), *given), want)


def test_a_transposed_weight_is_read_where_it_lies():
    x, W, bias, a, b = tensors(3)
    stored = W.t().contiguous()
    got = folded_linear(x, Outer(), (a, b), stored.t(), bias)
    torch.testing.assert_close(got, F.linear(x, W + torch.outer(a, b), bias))


def test_a_trained_base_gets_its_gradient():
    x, W, bias, a, b = tensors(3)
    W = nn.Parameter(W)
    folded_linear(x, Outer(), (a, b), W, bias).sum().backward()
    torch.testing.assert_close(W.grad, x.detach().flatten(0, 1).sum(0).expand(4, 5))


@pytest.mark.parametrize("how", ["bfloat16 base", "autocast"])
def test_half_precision_does_not_round_the_change_away(how):
    x, W, _, a, b = (t.detach().float() for t in tensors(20))
    a = (1e-4 * a).requires_grad_()
    x = x.bfloat16() if how == "bfloat16 base" else x
    W = 100 * W.bfloat16() if how == "bfloat16 base" else 100 * W
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        got = folded_linear(x, Outer(), (a, b), W)
        got.float().sum().backward()
    assert got.dtype == torch.bfloat16 and a.grad.dtype == torch.float32
    wide = x.float()
    torch.testing.assert_close(
        a.grad, (wide.flatten(0, 1).sum(0) @ b).expand(4), rtol=0.03, atol=0.3
    )
    alone = folded_linear(x.detach(), Outer(), (a, b)).float()
    torch.testing.assert_close(alone, F.linear(wide, torch.outer(a, b)), rtol=0.02, atol=2e-5)
