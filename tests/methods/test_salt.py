"""SALT against the dense U relu(M) V^T in float64, on linear layers and convolutions."""

import pytest
import torch
from torch import nn

import plait
from plait.errors import PlaitError
from tiny_llama import assert_loss_falls

RELUS = ["values", "diagonal", "matrix", "none"]


def make(dtype=torch.float32, **options):
    layer = nn.Linear(12, 10).to(dtype)
    model = nn.Sequential(layer)
    adapter = plait.attach(model, "salt", **{"rank": 2, "seed": 1, **options})
    return model, adapter.deltas["0"]


def perturb(delta, size=0.5):
    with torch.no_grad():
        for p in delta.parameters():
            p.add_(size * torch.randn_like(p))


def oracle(delta, relu):
    """W' by the paper's formula, in float64, from its own SVD."""
    W = delta.site.weight().detach().double()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    signs = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
    U, Vh = U * signs, signs.t() * Vh
    a, b, X, Y = (p.detach().double() for p in (delta.a, delta.b, delta.X, delta.Y))
    k = len(a)
    M = torch.diag(S)
    M[:k, :k] = torch.diag(a * S[:k] + b)
    M[k:, k:] += X @ Y
    if relu == "values":
        M[:k, :k] = M[:k, :k].relu()
    elif relu == "diagonal":
        M = M + torch.diag(M.diagonal().relu() - M.diagonal())
    elif relu == "matrix":
        M = M.relu()
    return U @ M @ Vh


@pytest.mark.parametrize("relu", RELUS)
@pytest.mark.parametrize("top", [None, 0, 3, 10])
def test_dense_and_forward_equal_the_formula(relu, top):
    model, delta = make(relu=relu, top=top)
    perturb(delta, 1.0)
    wanted = oracle(delta, relu)
    W = delta.site.weight().detach().double()
    torch.testing.assert_close(delta.dense().double(), wanted - W, rtol=1e-4, atol=1e-5)
    x = torch.randn(2, 5, 12)
    y = torch.nn.functional.linear(x.double(), wanted, model[0].bias.double())
    torch.testing.assert_close(model(x).double(), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("relu", RELUS)
def test_start_is_exactly_the_base(relu):
    model, delta = make(relu=relu)
    assert torch.equal(delta.dense(), torch.zeros(10, 12))
    x = torch.randn(4, 12)
    assert torch.equal(model(x), delta.site.forward(x))


@pytest.mark.parametrize("relu", RELUS)
def test_every_parameter_but_X_gets_a_gradient_at_the_start(relu):
    model, delta = make(relu=relu)
    model(torch.randn(16, 12)).pow(2).sum().backward()
    for name in ("a", "b", "Y"):
        assert delta.get_parameter(name).grad.abs().sum() > 0, name


def test_scale_and_shift_alone_keep_the_singular_vectors():
    _, delta = make(top=10)
    with torch.no_grad():
        delta.a.uniform_(0.5, 1.5)
        delta.b.uniform_(0, 0.1)
    U, _, Vh = torch.linalg.svd(delta.site.weight().detach(), full_matrices=False)
    changed = U.t() @ (delta.site.weight() + delta.dense()).detach() @ Vh.t()
    off = changed - torch.diag(changed.diagonal())
    assert off.abs().max() < 1e-5


def test_rank_of_the_change_and_exact_export():
    model, delta = make(top=3)
    perturb(delta)
    low = delta.factors()
    assert low.rank == 3 + 2
    torch.testing.assert_close(low.dense(), delta.dense())
    lora = plait.adapters(model)["default"].to_lora()
    torch.testing.assert_close(lora.deltas["0"].dense(), delta.dense(), rtol=1e-4, atol=1e-5)


def test_top_zero_trains_only_the_low_rank_part_in_the_full_basis():
    _, delta = make(top=0)
    assert delta.a.numel() == delta.b.numel() == 0
    assert delta.X.shape == (10, 2)


def test_count():
    _, delta = make(top=3, rank=2)
    method = plait.get_method("salt")
    wanted = 2 * 3 + 2 * 2 * (10 - 3)
    assert sum(p.numel() for p in delta.parameters()) == wanted
    assert method.count([delta.site], delta.options) == wanted


def test_regulariser_is_zero_at_the_start_with_finite_gradients():
    model, delta = make()
    loss = plait.auxiliary_loss(model)
    assert loss.item() == 0
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in delta.parameters())


def test_regulariser_equals_its_formula():
    model, delta = make(regularizer=0.5)
    perturb(delta)
    S = torch.linalg.svdvals(delta.site.weight().detach())[:5]
    wanted = (delta.a * S + delta.b - S).norm() + (delta.X @ delta.Y).norm()
    torch.testing.assert_close(plait.auxiliary_loss(model), 0.5 * wanted, rtol=1e-4, atol=1e-5)
    _, silent = make(regularizer=0.0)
    assert type(silent).auxiliary_loss([silent], silent.context) is None


@pytest.mark.parametrize("relu", ["values", "matrix"])
def test_convolution_equals_linear_on_the_unfolded_input(relu):
    conv = nn.Conv2d(3, 8, 3, padding=1, stride=2)
    model = nn.Sequential(conv)
    adapter = plait.attach(model, "salt", targets="all-conv", rank=2, relu=relu)
    delta = adapter.deltas["0"]
    perturb(delta)
    x = torch.randn(2, 3, 6, 6)
    columns = torch.nn.functional.unfold(x, 3, padding=1, stride=2).transpose(1, 2)
    y = torch.nn.functional.linear(columns, oracle(delta, relu).float(), conv.bias)
    wanted = y.transpose(1, 2).reshape(2, 8, 3, 3)
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)


def test_singular_vectors_stay_out_of_the_file_and_come_back():
    model, delta = make()
    perturb(delta)
    adapter = plait.adapters(model)["default"]
    assert {n.rpartition(".")[2] for n in adapter.state_dict()} == {"a", "b", "X", "Y"}
    before = {n: b.clone() for n, b in delta.named_buffers()}
    delta.attached()
    assert all(torch.equal(before[n], b) for n, b in delta.named_buffers())


def test_not_attached_it_says_that_it_needs_the_base():
    model, delta = make()
    plait.detach(model)
    kept = delta.dense()  # the vectors are still there
    assert kept.shape == (10, 12)
    for name in ("U", "S", "Vh"):
        del delta._buffers[name]
    with pytest.raises(PlaitError, match="not attached"):
        delta.dense()


def test_impossible_options_are_refused():
    with pytest.raises(PlaitError, match="relu"):
        make(relu="both")
    with pytest.raises(PlaitError, match="singular values"):
        make(top=11)


@pytest.mark.parametrize("relu", ["values", "matrix"])
def test_loss_falls_on_a_tiny_llama(relu):
    assert_loss_falls("salt", lr=0.02, relu=relu)
