"""DoRA against dense float64 formulas, autograd and PEFT."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import plait
import tiny


def linear(bias=True, dtype=torch.float64, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(7, 5, bias=bias)).to(dtype)
    adapter = plait.attach(model, "dora", rank=2, seed=2, **options)
    return model, adapter.deltas["0"], adapter


def oracle(model, delta, x):
    """The paper's formula with V formed, its norm detached."""
    W, b = model[0].weight, model[0].bias
    V = W + delta.scaling * delta.B @ delta.A
    out = F.linear(x, (delta.m / V.norm(dim=1).detach())[:, None] * V)
    return out if b is None else out + b


@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients_equal_the_dense_formula(bias):
    model, delta, adapter = linear(bias)
    tiny.scramble(adapter, 0.5)
    x = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 4, 5, dtype=torch.float64)
    wanted = [x, delta.A, delta.B, delta.m]
    want = torch.autograd.grad(oracle(model, delta, x), wanted, g)
    torch.testing.assert_close(model(x), oracle(model, delta, x))
    for a, b in zip(torch.autograd.grad(model(x), wanted, g), want, strict=True):
        torch.testing.assert_close(a, b)
    y = delta.site.forward(x)
    for a, b in zip(torch.autograd.grad(y + delta(x, y), wanted, g), want, strict=True):
        torch.testing.assert_close(a, b)


def test_the_start_is_the_base_model_exactly():
    model = tiny.llama()
    before = tiny.logits(model)
    plait.attach(model, "dora", rank=4)
    assert torch.equal(tiny.logits(model), before)


def test_row_norms_of_the_merged_weight_are_m():
    _, delta, adapter = linear()
    tiny.scramble(adapter, 0.5)
    merged = delta.base_weight() + delta.dense()
    torch.testing.assert_close(merged.norm(dim=1), delta.m.abs())


def test_with_m_tied_to_the_lengths_it_is_lora():
    model, delta, adapter = linear()
    tiny.scramble(adapter, 0.5)
    with torch.no_grad():
        delta.m.copy_(delta.lengths())
        x = torch.randn(6, 7, dtype=torch.float64)
        low = delta.scaling * delta.B @ delta.A
        torch.testing.assert_close(model(x), F.linear(x, model[0].weight + low, model[0].bias))


def test_gradient_of_m_at_the_start():
    model, delta, _ = linear()
    x, g = torch.randn(6, 7, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    model(x).backward(g)
    torch.testing.assert_close(delta.m.grad, (g.T @ x * model[0].weight).sum(1) / delta.m)


def test_lengths_survive_strong_cancellation():
    """V = W - W + a little: the expanded square loses digits but neither sign nor order."""
    model, delta, _ = linear(dtype=torch.float32)
    W = model[0].weight
    U, S, Vh = torch.linalg.svd(W)
    with torch.no_grad():
        delta.B.copy_(-U[:, :2] * S[:2] / delta.scaling)
        delta.A.copy_(Vh[:2])
        V = W + delta.scaling * delta.B @ delta.A
        torch.testing.assert_close(delta.lengths(), V.norm(dim=1), rtol=1e-3, atol=1e-4)
        delta.B.copy_(-(W @ W[:2].T) / delta.scaling @ torch.linalg.inv(W[:2] @ W[:2].T))
        delta.A.copy_(W[:2])  # the first two rows of V vanish
        assert torch.isfinite(model(torch.randn(3, 7))).all()


def test_dropout_drops_the_change_and_not_the_base():
    torch.manual_seed(0)
    model, delta, adapter = linear(dropout=0.5)
    tiny.scramble(adapter, 0.5)
    model.train()
    x = torch.randn(1, 7, dtype=torch.float64)
    torch.manual_seed(9)
    out = model(x)
    torch.manual_seed(9)
    dropped = F.dropout(x, 0.5)
    assert not torch.equal(dropped, x)
    want = F.linear(x, model[0].weight, model[0].bias) + F.linear(dropped, delta.dense())
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(model.eval()(x), oracle(model, delta, x))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False),
        nn.Conv1d(4, 6, 2),
    ],
)
def test_convolution_norm_is_over_channels_and_kernel(conv):
    model = nn.Sequential(conv).double()
    adapter = plait.attach(model, "dora", rank=2, targets=["0"])
    tiny.scramble(adapter, 0.5)
    delta, kernel = adapter.deltas["0"], conv.weight
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    x = x.unsqueeze(-1).expand(2, 4, 8, 5) if kernel.dim() == 4 else x
    V = kernel + (delta.scaling * delta.B @ delta.A).view_as(kernel)
    length = V.flatten(1).norm(dim=1)
    W = (delta.m / length).reshape(-1, *[1] * (kernel.dim() - 1)) * V
    torch.testing.assert_close(model(x), conv._conv_forward(x, W, conv.bias))


def test_embedding_scales_every_output_feature():
    model = nn.Sequential(nn.Embedding(9, 4)).double()
    adapter = plait.attach(model, "dora", rank=2, targets=["0"])
    ids = torch.tensor([[1, 2, 8]])
    torch.testing.assert_close(model(ids), model[0].weight[ids])
    tiny.scramble(adapter, 0.5)
    delta = adapter.deltas["0"]
    table = model[0].weight.T + delta.dense()
    torch.testing.assert_close(model(ids), table.T[ids])
    torch.testing.assert_close(table.norm(dim=1), delta.m)


def test_weights_interpolate_between_base_and_adapted():
    model, _, adapter = linear()
    tiny.scramble(adapter, 0.5)
    x = torch.randn(6, 7, dtype=torch.float64)
    full = model(x)
    plait.activate(model, {})
    base = model(x)
    plait.activate(model, {"default": 0.25})
    torch.testing.assert_close(model(x), base + 0.25 * (full - base))


def test_bfloat16_base_keeps_small_stretches():
    """m / n = 1.01 rounds to 1.0078 in bfloat16; its distance from 1 must not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 4, bias=False)).bfloat16()
    adapter = plait.attach(model, "dora", rank=2)
    delta = adapter.deltas["0"]
    assert delta.m.dtype == torch.float32
    with torch.no_grad():
        delta.m.mul_(1.01)
        x = torch.randn(4096, 256).bfloat16()
        change = model(x).float() - delta.site.forward(x).float()
        base = delta.site.forward(x).float()
    assert float((change * base).sum() / base.square().sum()) == pytest.approx(0.01, rel=0.1)


def test_counts_and_training():
    model = tiny.llama()
    adapter = plait.attach(model, "dora", rank=4, seed=0)
    sites = [d.site for d in adapter.deltas.values()]
    want = sum(4 * (s.in_features + s.out_features) + s.out_features for s in sites)
    assert adapter.num_parameters() == adapter.method.count(sites, adapter.options) == want
    losses = tiny.losses(model, adapter)
    assert losses[-1] < 0.7 * losses[0]
    y = tiny.logits(model)
    plait.fuse(model)
    torch.testing.assert_close(tiny.logits(model), y, rtol=1e-4, atol=1e-4)


def test_logits_equal_peft():
    peft = pytest.importorskip("peft")
    model, other = tiny.llama(), tiny.llama()
    adapter = plait.attach(model, "dora", rank=4, alpha=6)
    tiny.scramble(adapter, 0.2)
    config = peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules="all-linear")
    theirs = peft.get_peft_model(other, config).eval()
    modules = dict(theirs.base_model.model.named_modules())
    with torch.no_grad():
        for path, delta in adapter.deltas.items():
            layer = modules[path]
            layer.lora_A["default"].weight.copy_(delta.A)
            layer.lora_B["default"].weight.copy_(delta.B)
            layer.lora_magnitude_vector["default"].weight.copy_(delta.m)
    want = theirs(input_ids=tiny.batch()["input_ids"]).logits
    torch.testing.assert_close(tiny.logits(model), want, rtol=1e-5, atol=1e-5)
