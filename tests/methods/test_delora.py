"""DeLoRA: terms of unit length, a bound that holds, and what the length of a factor does not do."""

import torch
from torch import nn
from torch.nn import functional as F

import plait
import tiny


def linear(rank=3, strength=2.0, start="zero"):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(9, 6)).double()
    adapter = plait.attach(model, "delora", rank=rank, strength=strength, start=start, seed=2)
    tiny.scramble(adapter, 0.5)
    return model, adapter.deltas["0"]


def test_output_and_gradients_equal_the_terms_written_out():
    model, delta = linear()
    W = model[0].weight
    x = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 6, dtype=torch.float64)
    lengths = torch.stack([column.norm() for column in W.t()]).detach()
    change = 0
    for a, b in zip(delta.A, delta.B.t(), strict=True):
        change = change + torch.outer(b / b.norm(), a / a.norm() * lengths)
    want = F.linear(x, W + delta.strength / 3 * change, model[0].bias)
    got = model(x)
    torch.testing.assert_close(got, want)
    tensors = [x, delta.A, delta.B, delta.strength]
    wanted = torch.autograd.grad(want, tensors, g)
    for p, q in zip(torch.autograd.grad(got, tensors, g), wanted, strict=True):
        torch.testing.assert_close(p, q)


def test_the_length_of_a_factor_changes_nothing():
    _, delta = linear()
    before = delta.dense()
    with torch.no_grad():
        delta.A.mul_(torch.tensor([[7.0], [0.2], [3.0]]))
        delta.B.mul_(11)
    torch.testing.assert_close(delta.dense(), before)


def test_the_norm_is_bounded_whatever_the_factors():
    _, delta = linear()
    for size in (1e-3, 1.0, 1e6):
        with torch.no_grad():
            delta.A.normal_().mul_(size)
            delta.B.normal_().mul_(size)
        bound = delta.strength.abs() * delta.lengths.max()
        assert torch.linalg.matrix_norm(delta.dense()) <= bound * (1 + 1e-9)


def test_what_is_held_back_is_the_first_step_s_change_of_direction():
    model, delta = linear(start="held")
    fresh = plait.attach(nn.Sequential(nn.Linear(9, 6)).double(), "delora", rank=3, seed=2)
    first = fresh.deltas["0"]
    torch.testing.assert_close(first.dense(), torch.zeros(6, 9, dtype=torch.float64))
    start = {n: getattr(delta, f"first_{n}") for n in "AB"}
    change = 0
    for (a, b), (c, d) in zip(
        zip(delta.A, delta.B.t(), strict=True),
        zip(start["A"], start["B"], strict=True),
        strict=True,
    ):
        change = change + delta.strength / 3 * torch.outer(b / b.norm(), a / a.norm())
        change = change - 2.0 / 3 * torch.outer(d / d.norm(), c / c.norm())
    torch.testing.assert_close(delta.dense(), change * model[0].weight.norm(dim=0))


def test_strength_is_a_factor():
    _, delta = linear()
    before = delta.dense()
    with torch.no_grad():
        delta.strength.mul_(3)
    torch.testing.assert_close(delta.dense(), 3 * before)


def test_the_start_is_the_base_model_exactly_and_learns():
    model = tiny.llama()
    before = tiny.logits(model)
    adapter = plait.attach(model, "delora", rank=4)
    torch.testing.assert_close(tiny.logits(model), before, rtol=1e-5, atol=1e-5)
    sites = [d.site for d in adapter.deltas.values()]
    want = sum(4 * sum(s.shape) + 1 for s in sites)
    assert adapter.num_parameters() == adapter.method.count(sites, adapter.options) == want
    losses = tiny.losses(model, adapter, lr=3e-3)
    assert losses[-1] < 0.8 * losses[0]


def test_dW_needs_no_base_because_column_lengths_are_stored(tmp_path):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(9, 6))
    adapter = plait.attach(model, "delora", rank=3, seed=2)
    tiny.scramble(adapter, 0.5)
    delta = adapter.deltas["0"]
    torch.testing.assert_close(delta.lengths, model[0].weight.norm(dim=0))
    want = delta.dense()
    adapter.save(tmp_path / "a")
    torch.testing.assert_close(plait.read_adapter(tmp_path / "a").deltas["0"].dense(), want)
