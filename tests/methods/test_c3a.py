"""C3A: circulant blocks entry by entry, and the transforms that stand for them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import plait
import tiny
from plait import kernels


def linear(inputs, outputs, block, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(inputs, outputs)).double()
    adapter = plait.attach(model, "c3a", block=block, seed=2, **options)
    tiny.scramble(adapter, 0.5)
    return model, adapter.deltas["0"]


def written_out(w, inputs):
    """dW, every entry from its place."""
    m, n, b = w.shape
    rows = [
        torch.stack([w[i // b, j // b, (j % b - i % b) % b] for j in range(n * b)])
        for i in range(m * b)
    ]
    return torch.stack(rows) / inputs


@pytest.mark.parametrize(
    ("inputs", "outputs", "block"), [(12, 8, 4), (10, 15, 5), (6, 6, 6), (4, 6, 1)]
)
def test_output_and_gradients_equal_the_blocks_written_out(inputs, outputs, block):
    model, delta = linear(inputs, outputs, block)
    x = torch.randn(2, 3, inputs, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 3, outputs, dtype=torch.float64)
    dW = written_out(delta.w, inputs)
    torch.testing.assert_close(delta.dense(), dW)
    want = F.linear(x, model[0].weight + dW, model[0].bias)
    got = model(x)
    torch.testing.assert_close(got, want)
    wanted = torch.autograd.grad(want, [x, delta.w], g)
    for a, b in zip(torch.autograd.grad(got, [x, delta.w], g), wanted, strict=True):
        torch.testing.assert_close(a, b)
    with kernels.use_reference():
        torch.testing.assert_close(model(x), want)


def test_the_rank_of_a_block_is_its_size():
    _, delta = linear(12, 12, 12)
    assert delta.w.numel() == 12 and torch.linalg.matrix_rank(delta.dense()) == 12


def test_backward_keeps_x_and_the_kernel_alone():
    _, delta = linear(12, 8, 4)
    kept = []
    x = torch.randn(30, 12, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        delta(x)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), delta.w.data_ptr()}


def test_starts():
    model = tiny.llama()
    before = tiny.logits(model)
    adapter = plait.attach(model, "c3a", block=16, start="zeros")
    assert torch.equal(tiny.logits(model), before)
    assert all(d.traits.zero_start for d in adapter.deltas.values())
    losses = tiny.losses(model, adapter, lr=0.3)
    assert losses[-1] < 0.8 * losses[0]
    bounds = {"xavier_uniform": (6 / 80) ** 0.5, "kaiming_uniform": (1 / 32) ** 0.5}
    for start, bound in bounds.items():
        model = tiny.llama()
        adapter = plait.attach(model, "c3a", block=2, targets=["gate_proj"], start=start)
        w = torch.cat([d.w.detach().flatten() for d in adapter.deltas.values()])
        assert 0.95 * bound < float(w.abs().max()) <= bound
        assert not torch.equal(tiny.logits(model), before)


def test_counts_and_sizes():
    model = tiny.llama()
    adapter = plait.attach(model, "c3a", block=8)
    sites = [d.site for d in adapter.deltas.values()]
    want = sum(s.out_features * s.in_features // 8 for s in sites)
    assert adapter.num_parameters() == adapter.method.count(sites, adapter.options) == want
    with pytest.raises(plait.PlaitError, match="6 and its divisors"):
        plait.attach(nn.Sequential(nn.Linear(12, 18)), "c3a", block=4)


def test_half_precision_is_computed_in_float32():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 24, bias=False)).bfloat16()
    delta = plait.attach(model, "c3a", block=8, start="gaussian", seed=2).deltas["0"]
    x = torch.randn(40, 16).bfloat16()
    got = delta(x)
    assert got.dtype == torch.bfloat16
    wanted = F.linear(x.float(), delta.dense())
    torch.testing.assert_close(got.float(), wanted, rtol=5e-3, atol=1e-5)


def test_the_block_follows_each_site_where_none_is_given():
    model = nn.Sequential(nn.Linear(576, 192), nn.Linear(192, 640))
    adapter = plait.attach(model, "c3a", targets="all-linear", seed=0)
    assert [d.w.shape[-1] for d in adapter.deltas.values()] == [192, 64]
    assert adapter.num_parameters() == 576 * 192 // 192 + 192 * 640 // 64
