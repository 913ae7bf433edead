"""LoKr against torch.kron, in float64."""

import pytest
import torch
from torch import nn

import plait
from plait.errors import PlaitError
from tiny import scramble

FORMS = [
    {"rank": 1000},
    {"rank": 2},
    {"rank": 1, "decompose_both": True, "alpha": 3.0},
    {"rank": 2, "factor": 3, "zero": "w2"},
]


def make(rows=15, columns=24, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(columns, rows)).double()
    adapter = plait.attach(model, "lokr", seed=2, **options)
    return model, adapter.deltas["0"], adapter


def oracle(delta):
    p = dict(delta.named_parameters())
    w1 = p["w1"] if "w1" in p else p["w1_a"] @ p["w1_b"]
    w2 = p["w2"] if "w2" in p else p["w2_a"] @ p["w2_b"]
    alpha = delta.options.alpha or delta.options.rank
    return alpha / delta.options.rank * torch.kron(w1, w2)


@pytest.mark.parametrize("options", FORMS)
def test_forward_without_the_product_equals_the_product(options):
    model, delta, adapter = make(**options)
    scramble(adapter, 0.5)
    torch.testing.assert_close(delta.dense(), oracle(delta))
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    wanted = delta.site.forward(x) + x @ oracle(delta).t()
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("options", FORMS)
def test_gradients_equal_those_through_the_product(options):
    model, delta, adapter = make(**options)
    scramble(adapter, 0.5)
    x = torch.randn(7, 24, dtype=torch.float64, requires_grad=True)
    G = torch.randn(7, 15, dtype=torch.float64)
    inputs = [*adapter.parameters(), x]
    got = torch.autograd.grad((model(x) * G).sum(), inputs)
    y = delta.site.forward(x) + x @ oracle(delta).t()
    wanted = torch.autograd.grad((y * G).sum(), inputs)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", FORMS)
def test_start_is_the_base_and_one_factor_gets_a_gradient(options):
    model, delta, _ = make(**options)
    x = torch.randn(5, 24, dtype=torch.float64)
    assert torch.equal(model(x), delta.site.forward(x))
    model(x).sum().backward()
    moved = {n for n, p in delta.named_parameters() if p.grad.abs().max() > 0}
    zero = options.get("zero", "w1")
    assert moved and all(n.startswith(zero) for n in moved)


def test_rank_of_the_change_is_the_product_of_the_ranks():
    _, delta, adapter = make(rank=2)
    scramble(adapter, 0.5)
    rank = torch.linalg.matrix_rank
    assert rank(delta.dense()) == rank(delta.w1) * 2 == 6


def test_a_low_rank_factor_gives_an_exact_lora():
    _, delta, adapter = make(rank=1, decompose_both=True)
    scramble(adapter, 0.5)
    lora = adapter.to_lora().deltas["0"]
    assert lora.rank == 1
    torch.testing.assert_close(lora.dense(), oracle(delta))
    assert make(rank=1000)[1].factors() is None


def test_count_and_shapes():
    method = plait.get_method("lokr")
    for options in FORMS:
        _, delta, adapter = make(**options)
        assert adapter.num_parameters() == method.count([delta.site], delta.options)
    _, delta, _ = make(rank=1000)
    assert delta.w1.shape == (3, 4) and delta.w2.shape == (5, 6)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rank", [1, 100])
def test_convolution(kernel, groups, rank):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(8, 6, kernel, padding=1, groups=groups)).double()
    adapter = plait.attach(model, "lokr", targets="all-conv", rank=rank, seed=2)
    scramble(adapter, 0.5)
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    weight = model[0].weight + oracle(adapter.deltas["0"]).view_as(model[0].weight)
    wanted = nn.functional.conv2d(x, weight, model[0].bias, padding=1, groups=groups)
    torch.testing.assert_close(model(x), wanted)


def test_a_tucker_kernel():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1)).double()
    adapter = plait.attach(model, "lokr", targets="all-conv", rank=1, tucker=True, seed=2)
    delta = adapter.deltas["0"]
    scramble(adapter, 0.5)
    w2 = torch.zeros(3, 4, 3, 3, dtype=torch.float64)
    for p in range(3):
        for q in range(4):
            w2[p, q] = delta.w2_a[0, p] * delta.w2_b[0, q] * delta.t2[0, 0]
    dW = torch.kron(delta.w1[..., None, None], w2)
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    wanted = nn.functional.conv2d(x, model[0].weight + dW, model[0].bias, padding=1)
    torch.testing.assert_close(model(x), wanted)
    assert adapter.num_parameters() == 2 * 2 + 3 + 4 + 9
    assert adapter.method.count([delta.site], delta.options) == adapter.num_parameters()


def test_dropout_acts_in_training_only():
    model, delta, adapter = make(rank=4, dropout=0.5)
    scramble(adapter, 0.5)
    x = torch.randn(6, 24, dtype=torch.float64)
    model.eval()
    still = model(x)
    torch.testing.assert_close(still, delta.site.forward(x) + x @ oracle(delta).t())
    model.train()
    assert not torch.allclose(model(x), still)


def test_impossible_options_are_refused():
    for options in ({"rank": 0}, {"factor": 0}, {"zero": "both"}, {"dropout": 1.0}):
        with pytest.raises(PlaitError):
            make(**options)
