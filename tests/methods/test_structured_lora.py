"""StructuredLoRA: three trained factors, and which of them moves first."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import plait
import tiny


def linear(**options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(9, 6)).double()
    adapter = plait.attach(model, "structured-lora", seed=2, **{"rank": 3, **options})
    return model, adapter.deltas["0"], adapter


def test_the_start_is_the_base_and_only_b_has_a_gradient():
    model, delta, _ = linear()
    x = torch.randn(7, 9, dtype=torch.float64)
    assert torch.equal(model(x), F.linear(x, model[0].weight, model[0].bias))
    model(x).square().sum().backward()
    assert delta.B.grad.abs().sum() > 0
    assert delta.A.grad.abs().sum() == 0 and delta.R.grad.abs().sum() == 0


def test_dense_forward_and_gradients_follow_the_formula():
    model, delta, adapter = linear(alpha=6.0)
    tiny.scramble(adapter, 0.5)
    A, R, B = (getattr(delta, n).detach().clone().requires_grad_() for n in "ARB")
    x, g = torch.randn(7, 9, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)
    want = F.linear(x, model[0].weight + 2 * B @ R @ A, model[0].bias)
    torch.testing.assert_close(model(x), want)
    torch.testing.assert_close(delta.dense(), 2 * B @ R @ A)
    want.backward(g)
    model(x).backward(g)
    for name, oracle in {"A": A, "R": R, "B": B}.items():
        torch.testing.assert_close(getattr(delta, name).grad, oracle.grad)


def test_counts_and_the_scaling_of_one():
    _, delta, adapter = linear()
    assert adapter.num_parameters() == 3 * (9 + 6) + 9
    assert adapter.method.count([delta.site], delta.options) == adapter.num_parameters()
    assert delta.scaling == 1.0 and adapter.method.options().rank == 128


def test_the_export_is_a_lora_of_the_same_rank():
    _, delta, adapter = linear()
    tiny.scramble(adapter, 0.5)
    low = adapter.to_lora().deltas["0"]
    assert low.rank == 3
    torch.testing.assert_close(low.dense(), delta.dense())


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_of_plain_pairs_are_refused(start):
    with pytest.raises(plait.PlaitError, match="pair"):
        linear(initializer=start)


def test_training():
    model = tiny.llama()
    adapter = plait.attach(model, "structured-lora", rank=4, alpha=16, seed=0)
    losses = tiny.losses(model, adapter, steps=30)
    assert losses[-1] < 0.7 * losses[0]
