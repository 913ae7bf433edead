"""LoHa against the dense formula, on both of its ways."""

import dataclasses

import pytest
import torch
from torch import nn

import plait
from plait import kernels, testing
from plait.errors import PlaitError
from tiny import scramble

RANKS = [1, 2, 4]  # of a 15 x 24 layer: by factors, by dW, and of more than full rank


def make(rank, dtype=torch.float64, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(24, 15)).to(dtype)
    adapter = plait.attach(model, "loha", rank=rank, seed=2, **options)
    return model, adapter.deltas["0"], adapter


def oracle(delta):
    p = dict(delta.named_parameters())
    alpha = delta.options.alpha or delta.options.rank
    product = (p["w1_a"] @ p["w1_b"]) * (p["w2_a"] @ p["w2_b"])
    return alpha / delta.options.rank * product


@pytest.mark.parametrize("rank", RANKS)
def test_output_and_gradients_equal_those_of_the_dense_formula(rank):
    model, delta, adapter = make(rank, alpha=3.0)
    assert delta.traits.low_rank == (rank == 1)
    scramble(adapter, 0.5)
    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    G = torch.randn(2, 5, 15, dtype=torch.float64)
    wanted = delta.site.forward(x) + x @ oracle(delta).t()
    inputs = [*adapter.parameters(), x]
    expected = torch.autograd.grad((wanted * G).sum(), inputs)
    plait.activate(model, {"default": 1.0})
    ways = [model(x), delta.site.forward(x) + delta(x)]
    for got in ways:
        torch.testing.assert_close(got, wanted)
        for a, b in zip(torch.autograd.grad((got * G).sum(), inputs), expected, strict=True):
            torch.testing.assert_close(a, b)
    with kernels.use_reference():
        torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("rank", RANKS)
def test_rank_of_the_change_is_r_squared(rank):
    _, delta, adapter = make(rank)
    scramble(adapter, 0.5)
    assert torch.linalg.matrix_rank(delta.dense()) == min(rank**2, 15)


def test_a_small_rank_is_exactly_a_lora_of_rank_r_squared():
    for rank in (1, 3):
        _, delta, adapter = make(rank)
        scramble(adapter, 0.5)
        lora = adapter.to_lora().deltas["0"]
        assert lora.rank == rank**2
        torch.testing.assert_close(lora.dense(), oracle(delta))


@pytest.mark.parametrize("rank", RANKS)
def test_start_is_the_base_and_only_the_zero_matrix_moves_first(rank):
    model, delta, _ = make(rank, torch.float32)
    x = torch.randn(5, 24)
    assert torch.equal(model(x), delta.site.forward(x))
    model(x).square().sum().backward()
    moved = {n for n, p in delta.named_parameters() if p.grad.abs().max() > 0}
    assert moved == {"w2_b"}


def test_nothing_of_the_weight_s_size_is_kept_for_backward():
    for rank in (1, 2):
        model, _, _ = make(rank)
        weight, kept = model[0].weight, []
        x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep_in(kept), lambda t: t):
            model(x)
        sizes = [t.numel() for t in kept if t.data_ptr() != weight.data_ptr()]
        assert max(sizes) < weight.numel()


def keep_in(kept):
    return lambda t: kept.append(t) or t


def test_half_precision_base_keeps_a_change_below_its_rounding():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(24, 15)).bfloat16()
    with torch.no_grad():
        model[0].weight.fill_(64.0)
    adapter = plait.attach(model, "loha", rank=4, seed=2)
    scramble(adapter, 0.2)
    half = torch.randn(4, 12).bfloat16()
    x = torch.cat([half, -half], dim=1)  # W x = 0 exactly, so that only the change is left
    delta = adapter.deltas["0"]
    wanted = x.float() @ oracle(delta).t() + model[0].bias
    assert (model(x) - wanted).abs().max() < 0.02 * wanted.abs().max()


@pytest.mark.parametrize("rank", [1, 2])
def test_convolution(rank):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)).double()
    adapter = plait.attach(model, "loha", targets="all-conv", rank=rank, seed=2)
    scramble(adapter, 0.5)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    weight = model[0].weight + oracle(adapter.deltas["0"]).view_as(model[0].weight)
    wanted = nn.functional.conv2d(x, weight, model[0].bias, padding=1)
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("convolution", [nn.Conv1d, nn.Conv2d])
def test_a_tucker_kernel(convolution):
    torch.manual_seed(1)
    model = nn.Sequential(convolution(4, 6, 3, padding=1)).double()
    adapter = plait.attach(model, "loha", targets="all-conv", rank=2, tucker=True, seed=2)
    weight, delta = model[0].weight, adapter.deltas["0"]
    x = torch.randn(2, 4, *[5] * (weight.dim() - 2), dtype=torch.float64)
    assert torch.equal(model(x), delta.site.forward(x))
    scramble(adapter, 0.5)
    rows, channels, area = 6, 4, weight[0, 0].numel()
    assert adapter.num_parameters() == 2 * (2 * 2 * area + 2 * (rows + channels))
    factors = []
    for t, a, b in (("t1", "w1_a", "w1_b"), ("t2", "w2_a", "w2_b")):
        t, a, b = (delta.get_parameter(name) for name in (t, a, b))
        t = t.flatten(2)
        kernels_ = [a.t() @ t[:, :, k] @ b for k in range(area)]
        factors.append(torch.stack(kernels_, -1))
    wanted = weight + (factors[0] * factors[1]).view_as(weight)
    run = nn.functional.conv1d if weight.dim() == 3 else nn.functional.conv2d
    torch.testing.assert_close(model(x), run(x, wanted, model[0].bias, padding=1))


def test_the_kit_holds_by_factors_too():
    method = dataclasses.replace(plait.get_method("loha"), example={"rank": 1})
    checks = {"forward_equals_dense", "gradients_are_derivatives", "two_adapters", "loss_falls"}
    assert testing.check_method(method, kinds=["linear"], checks=checks) >= 4


def test_dropout_acts_in_training_only():
    for rank in (1, 4):
        model, delta, adapter = make(rank, dropout=0.5)
        scramble(adapter, 0.5)
        x = torch.randn(6, 24, dtype=torch.float64)
        model.eval()
        still = model(x)
        torch.testing.assert_close(still, delta.site.forward(x) + x @ oracle(delta).t())
        model.train()
        assert not torch.allclose(model(x), still)


def test_impossible_options_are_refused():
    for options in ({"rank": 0}, {"rank": 2, "dropout": 1.0}):
        with pytest.raises(PlaitError):
            make(**options)
