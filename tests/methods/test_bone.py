"""Bone and MiSS against dense block formulas written with loops, in float64."""

import pytest
import torch
from torch import nn

import plait
from plait.errors import PlaitError
from tiny_llama import assert_loss_falls

VARIANTS = [
    {"rank": 4},
    {"rank": 5},  # does not divide 12: the last block is cut off
    {"rank": 20},  # wider than the input
    {"rank": 4, "mini_r": 2},
    {"rank": 5, "mini_r": 4},
    {"rank": 4, "variant": "bat"},
]


def make(dtype=torch.float32, bias=True, rows=8, columns=12, **options):
    model = nn.Sequential(nn.Linear(columns, rows, bias=bias)).to(dtype)
    adapter = plait.attach(model, "bone", **options)
    return model, adapter.deltas["0"]


def perturb(delta, size=0.3):
    with torch.no_grad():
        for p in delta.parameters():
            p.add_(size * torch.randn_like(p))


def oracle(delta):
    """dW entry by entry."""
    W = delta.site.weight().detach().double()
    D, r = delta.D.detach().double(), delta.options.rank
    dW = torch.zeros_like(W)
    for o in range(W.shape[0]):
        for i in range(W.shape[1]):
            if delta.options.variant == "miss":
                dW[o, i] = D[i % r, o % D.shape[1]]
            else:
                block, row, j, c = o // r, o % r, i // r, i % r
                dW[o, i] = D[block, row, c] + sum(
                    W[o, j * r + b] * D[block, b, c] for b in range(r)
                )
    return dW


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("bias", [True, False])
def test_dense_and_forward_equal_the_block_formula(options, bias):
    model, delta = make(bias=bias, **options)
    perturb(delta)
    wanted = oracle(delta)
    torch.testing.assert_close(delta.dense().double(), wanted, rtol=1e-5, atol=1e-5)
    x = torch.randn(2, 5, 12)
    y = delta.site.forward(x)
    expected = (y.double() + x.double() @ wanted.t()).float()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y + delta(x, y), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", VARIANTS)
def test_start_is_the_base_in_bits(options):
    model, delta = make(**options)
    x = torch.randn(3, 12)
    assert torch.equal(model(x), delta.site.forward(x))


@pytest.mark.parametrize("options", VARIANTS)
def test_gradients_are_those_of_the_dense_formula(options):
    model, delta = make(dtype=torch.float64, **options)
    perturb(delta)
    x = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    G = torch.randn(6, 8, dtype=torch.float64)
    grads = torch.autograd.grad((model(x) * G).sum(), [delta.D, x])
    y = delta.site.forward(x) + x @ delta.dense().t()
    wanted = torch.autograd.grad((y * G).sum(), [delta.D, x])
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_gradient_of_miss_is_the_sum_of_the_transposed_blocks():
    model, delta = make(rank=4)
    x = torch.randn(6, 12)
    G = torch.randn(6, 8)
    (model(x) * G).sum().backward()
    of_weight = G.t() @ x
    wanted = sum(of_weight[:, j : j + 4].t() for j in range(0, 12, 4))
    torch.testing.assert_close(delta.D.grad, wanted, rtol=1e-4, atol=1e-5)


def test_rank_of_the_change():
    _, miss = make(rank=3, rows=9)
    perturb(miss)
    assert torch.linalg.matrix_rank(miss.dense().double()) == 3
    _, bat = make(rank=4, variant="bat")
    perturb(bat)
    assert torch.linalg.matrix_rank(bat.dense().double()) == 8


def test_miss_is_exact_as_a_lora():
    model, delta = make(rank=5)
    perturb(delta)
    lora = plait.adapters(model)["default"].to_lora()
    assert torch.equal(lora.deltas["0"].dense(), delta.dense())


def test_bat_weight_is_affine_in_each_block_and_invertible():
    model, delta = make(rank=4, variant="bat")
    perturb(delta, 0.1)
    W = delta.site.weight().detach().clone()
    plait.fuse(model)
    fused = model[0].weight.detach().clone()
    blocks = []
    for i in range(2):
        inverse = torch.linalg.inv(torch.eye(4) + delta.D[i].detach())
        row = fused[4 * i : 4 * i + 4]
        blocks.append(
            torch.cat(
                [(row[:, j : j + 4] - delta.D[i].detach()) @ inverse for j in (0, 4, 8)], dim=1
            )
        )
    torch.testing.assert_close(torch.cat(blocks), W, rtol=1e-4, atol=1e-4)
    plait.unfuse(model)
    assert torch.equal(model[0].weight, W)


def test_mini_of_full_width_is_miss():
    _, full = make(rank=4)
    perturb(full)
    _, mini = make(rank=4, mini_r=8)
    with torch.no_grad():
        mini.D.copy_(full.D)
    x = torch.randn(3, 12)
    assert torch.equal(mini.dense(), full.dense())
    torch.testing.assert_close(mini(x), full(x))


def test_count():
    method = plait.get_method("bone")
    for options, wanted in [
        ({"rank": 4}, 4 * 8),
        ({"rank": 4, "mini_r": 2}, 4 * 2),
        ({"rank": 4, "variant": "bat"}, 4 * 8),
    ]:
        _, delta = make(**options)
        assert delta.D.numel() == method.count([delta.site], delta.options) == wanted


def test_first_gradient_is_larger_than_loras():
    torch.manual_seed(3)
    x, G = torch.randn(32, 12), torch.randn(32, 8)
    norms = []
    for name, rank in (("bone", 5), ("lora", 2)):  # 40 parameters each
        model = nn.Sequential(nn.Linear(12, 8))
        adapter = plait.attach(model, name, rank=rank)
        (model(x) * G).sum().backward()
        norms.append(sum(p.grad.square().sum() for p in adapter.parameters()))
    assert norms[0] > norms[1]


def test_dropout_acts_in_training_only():
    for options in ({"rank": 4}, {"rank": 4, "variant": "bat"}):
        model, delta = make(dropout=0.5, **options)
        perturb(delta)
        x = torch.randn(6, 12)
        model.eval()
        still = model(x)
        torch.testing.assert_close(still, delta.site.forward(x) + x @ delta.dense().t())
        model.train()
        assert not torch.allclose(model(x), still)


def test_impossible_options_are_refused():
    for options, message in [
        ({"rank": 5, "variant": "bat"}, "tile"),
        ({"rank": 4, "mini_r": 3}, "divide"),
        ({"variant": "both"}, "variant"),
        ({"rank": 4, "variant": "bat", "mini_r": 2}, "mini_r"),
    ]:
        with pytest.raises(PlaitError, match=message):
            make(**options)


@pytest.mark.parametrize("options", [{"rank": 8}, {"rank": 8, "mini_r": 8}, {"variant": "bat"}])
def test_loss_falls_on_a_tiny_llama(options):
    assert_loss_falls("bone", lr=3e-3, **{"rank": 8, **options})
