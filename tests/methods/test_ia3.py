"""(IA)^3: which side is scaled, the bias, gradients; against dense formulas and PEFT."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import plait
import tiny


def linear(feedforward, **more):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(9, 6)).double()
    given = ("0",) if feedforward else ()
    adapter = plait.attach(model, "ia3", targets=["0"], feedforward=given, **more)
    return model, adapter.deltas["0"], adapter


def oracle(model, delta, x):
    W, b = model[0].weight, model[0].bias
    if delta.feedforward:
        return F.linear(x * delta.l, W, b)
    return delta.l * F.linear(x, W, b)


@pytest.mark.parametrize("feedforward", [True, False])
def test_forward_and_gradients_equal_the_formula(feedforward):
    model, delta, adapter = linear(feedforward)
    assert len(delta.l) == (9 if feedforward else 6)
    tiny.scramble(adapter, 0.5)
    x = torch.randn(3, 4, 9, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 4, 6, dtype=torch.float64)
    want = torch.autograd.grad(oracle(model, delta, x), [x, delta.l], g)
    y = delta.site.forward(x)
    for got in (model(x), y + delta(x, y)):
        torch.testing.assert_close(got, oracle(model, delta, x))
        for a, b in zip(torch.autograd.grad(got, [x, delta.l], g), want, strict=True):
            torch.testing.assert_close(a, b)


def test_gradient_of_an_output_factor_sums_g_times_the_output():
    model, delta, adapter = linear(False)
    tiny.scramble(adapter, 0.5)
    x, g = torch.randn(7, 9, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)
    model(x).backward(g)
    base = F.linear(x, model[0].weight, model[0].bias)
    torch.testing.assert_close(delta.l.grad, (g * base).sum(0))


@pytest.mark.parametrize("feedforward", [True, False])
def test_fused_weight_and_bias_equal_the_forward(feedforward):
    model, delta, adapter = linear(feedforward)
    tiny.scramble(adapter, 0.5)
    x = torch.randn(5, 9, dtype=torch.float64)
    W, b, y = model[0].weight.detach(), model[0].bias.detach(), model(x)
    plait.fuse(model)
    torch.testing.assert_close(model(x), y)
    want = (W * delta.l, b) if feedforward else (delta.l[:, None] * W, delta.l * b)
    torch.testing.assert_close((model[0].weight, model[0].bias), want)


@pytest.mark.parametrize("feedforward", [True, False])
def test_convolutions(feedforward):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)).double()
    given = ("0",) if feedforward else ()
    adapter = plait.attach(model, "ia3", targets=["0"], feedforward=given)
    tiny.scramble(adapter, 0.5)
    l, x = adapter.deltas["0"].l, torch.randn(2, 3, 5, 5, dtype=torch.float64)
    conv = model[0]
    base = conv._conv_forward
    if feedforward:
        want = base(x * l[:, None, None], conv.weight, conv.bias)
    else:
        want = base(x, conv.weight, conv.bias) * l[:, None, None]
    got = model(x)
    torch.testing.assert_close(got, want)
    plait.fuse(model)
    torch.testing.assert_close(model(x), want)


def test_input_scaling_of_a_grouped_convolution_is_refused():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(plait.PlaitError, match="grouped"):
        plait.attach(model, "ia3", targets=["0"], feedforward=("0",))


def test_defaults_on_a_llama():
    model = tiny.llama()
    before = tiny.logits(model)
    adapter = plait.attach(model, "ia3")
    assert torch.equal(tiny.logits(model), before)
    ends = {p.rpartition(".")[2]: d.feedforward for p, d in adapter.deltas.items()}
    assert ends == {"k_proj": False, "v_proj": False, "down_proj": True}
    sites = [d.site for d in adapter.deltas.values()]
    want = 2 * (16 + 16 + 48)  # d_k + d_v + d_ff in each of two blocks
    assert adapter.num_parameters() == adapter.method.count(sites, adapter.options) == want


def test_training():
    model = tiny.llama()
    adapter = plait.attach(model, "ia3", targets="all-linear")
    losses = tiny.losses(model, adapter, lr=5e-2)
    assert losses[-1] < 0.8 * losses[0]


def test_logits_equal_peft():
    peft = pytest.importorskip("peft")
    model, other = tiny.llama(), tiny.llama()
    adapter = plait.attach(model, "ia3")
    tiny.scramble(adapter, 0.2)
    config = peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    theirs = peft.get_peft_model(other, config).eval()
    modules = dict(theirs.base_model.model.named_modules())
    with torch.no_grad():
        for path, delta in adapter.deltas.items():
            layer = modules[path].ia3_l["default"]
            layer.copy_(delta.l.view_as(layer))
    want = theirs(input_ids=tiny.batch()["input_ids"]).logits
    torch.testing.assert_close(tiny.logits(model), want, rtol=1e-5, atol=1e-5)
