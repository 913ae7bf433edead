"""KaSA: what is cut, what is learned, and the two penalties."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import plait
import tiny


def linear(shape=(6, 9), **options):
    rows, columns = shape
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(columns, rows)).double()
    adapter = plait.attach(model, "kasa", seed=2, **{"rank": 2, "alpha": 6.0, **options})
    return model, adapter.deltas["0"], adapter


def truncated(W, r):
    """W without its r smallest singular triplets."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U[:, :-r] * S[:-r]) @ Vh[:-r]


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_the_start_is_the_truncated_model(shape):
    model, delta, _ = linear(shape)
    W = model[0].weight.detach()
    x = torch.randn(5, shape[1], dtype=torch.float64)
    torch.testing.assert_close(model(x), F.linear(x, truncated(W, 2), model[0].bias))
    S = torch.linalg.svdvals(W)
    torch.testing.assert_close(torch.linalg.matrix_norm(delta.dense(), 2), S[-2])
    assert torch.equal(model[0].weight, W)


def test_dense_and_forward_follow_the_formula_and_detaching_gives_w_back():
    model, delta, adapter = linear()
    W = model[0].weight.detach().clone()
    tiny.scramble(adapter, 0.5)
    want = truncated(W, 2) + 3 * delta.B @ torch.diag(delta.e) @ delta.A
    x = torch.randn(2, 5, 9, dtype=torch.float64)
    torch.testing.assert_close(model(x), F.linear(x, want, model[0].bias))
    torch.testing.assert_close(W + delta.dense(), want)
    plait.fuse(model)
    torch.testing.assert_close(model[0].weight, want)
    plait.unfuse(model)
    plait.detach(model)
    assert torch.equal(model[0].weight, W)


def test_gradient_of_e_is_the_diagonal_of_the_projected_gradient_and_its_penalty():
    model, delta, adapter = linear(beta=0.1, gamma=0.0)
    tiny.scramble(adapter, 0.5)
    x, g = torch.randn(7, 9, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)
    ((model(x) * g).sum() + plait.auxiliary_loss(model)).backward()
    want = 3 * torch.diag(delta.B.T @ (g.T @ x) @ delta.A.T) + 2 * 0.1 * delta.e
    torch.testing.assert_close(delta.e.grad, want)


def test_penalties_vanish_for_an_svd_of_size_zero_with_finite_gradients():
    model, delta, _ = linear(beta=1.0, gamma=1.0)
    delta.set_pair(
        torch.linalg.qr(torch.randn(9, 2, dtype=torch.float64)).Q.T,
        torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64)).Q,
    )
    with torch.no_grad():
        delta.e.zero_()
    loss = plait.auxiliary_loss(model)
    assert loss.abs() < 1e-12
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in delta.parameters())


def test_penalties_are_the_formula_averaged_over_sites():
    model = tiny.llama()
    adapter = plait.attach(model, "kasa", rank=3, beta=0.2, gamma=0.3, seed=0)
    tiny.scramble(adapter, 0.3)
    eye = torch.eye(3)
    total = 0.0
    for d in adapter.deltas.values():
        total += 0.2 * d.e.norm() ** 2
        total += 0.3 * ((d.B.T @ d.B - eye).norm() + (d.A @ d.A.T - eye).norm())
    torch.testing.assert_close(plait.auxiliary_loss(model), total / len(adapter.deltas))
    run = plait.RuleStack(model, lr=1e-3)
    torch.testing.assert_close(run.extra_loss(), total / len(adapter.deltas))
    other = tiny.llama()
    plait.attach(other, "kasa", rank=3, beta=0.0, gamma=0.0)
    assert plait.RuleStack(other).extra_loss() == 0.0


def test_counts():
    model = tiny.llama()
    adapter = plait.attach(model, "kasa", rank=3)
    sites = [d.site for d in adapter.deltas.values()]
    want = sum(3 * (s.in_features + s.out_features + 1) for s in sites)
    assert adapter.num_parameters() == adapter.method.count(sites, adapter.options) == want


def test_without_truncation_it_starts_at_the_base():
    model, delta, _ = linear(truncate=False)
    x = torch.randn(5, 9, dtype=torch.float64)
    assert torch.equal(model(x), F.linear(x, model[0].weight, model[0].bias))
    assert delta.traits.zero_start and delta.factors().rank == 2


def test_the_export_is_a_lora_of_twice_the_rank_on_the_original_base():
    _, delta, adapter = linear()
    tiny.scramble(adapter, 0.5)
    low = adapter.to_lora().deltas["0"]
    assert low.rank == 4
    torch.testing.assert_close(low.dense(), delta.dense())


def test_other_adapters_keep_their_base():
    model, _, _ = linear()
    other = plait.attach(model, "lora", rank=2, name="other")
    tiny.scramble(other, 0.5)
    x = torch.randn(5, 9, dtype=torch.float64)
    W = model[0].weight + other.deltas["0"].dense()
    torch.testing.assert_close(model(x), F.linear(x, W, model[0].bias))


def test_a_float32_base_is_cut_as_well_as_an_svd_cuts_it():
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(40, 40)).Q for _ in range(2))
    S = torch.logspace(0, -5, 40)
    model = nn.Sequential(nn.Linear(40, 40, bias=False))
    model[0].weight.data = (U * S) @ V.T
    delta = plait.attach(model, "kasa", rank=4).deltas["0"]
    W = model[0].weight.detach().double()
    error = (W + delta.dense().double() - truncated(W, 4)).norm()
    assert error < 1e-7


def test_convolutions_are_cut_in_their_unrolled_form():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False))
    W = model[0].weight.detach().clone()
    plait.attach(model, "kasa", rank=2, targets=["0"])
    x = torch.randn(2, 4, 7, 7)
    want = F.conv2d(x, truncated(W.flatten(1), 2).view_as(W))
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)


def test_a_rank_that_would_cut_everything_is_refused():
    with pytest.raises(plait.PlaitError, match="cut all"):
        linear(rank=6)
    linear(rank=6, truncate=False)


def test_training():
    model = tiny.llama()
    adapter = plait.attach(model, "kasa", rank=4, alpha=16, seed=0)
    losses = tiny.losses(model, adapter)
    assert losses[-1] < 0.7 * losses[0]


def test_gamma_draws_the_factors_towards_orthonormal_ones():
    gaps = {}
    for gamma in (0.0, 1.0):
        model = tiny.llama()
        adapter = plait.attach(model, "kasa", rank=4, gamma=gamma, seed=0)
        run = plait.RuleStack(model, lr=1e-2)
        for _ in range(25):
            (model(**tiny.batch()).loss + run.extra_loss()).backward()
            run.step()
        eye = torch.eye(4)
        gaps[gamma] = sum(
            float((d.A @ d.A.T - eye).norm().detach()) for d in adapter.deltas.values()
        )
    assert gaps[1.0] < 0.6 * gaps[0.0]


def test_a_cut_that_is_no_noise_is_said():
    sharp, flat = nn.Linear(8, 8), nn.Linear(8, 8)
    with torch.no_grad():
        sharp.weight.copy_(torch.diag(torch.logspace(0, -7, 8)))
        flat.weight.copy_(torch.eye(8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plait.attach(nn.Sequential(sharp), "kasa", rank=2)
    with pytest.warns(UserWarning, match="not noise"):
        plait.attach(nn.Sequential(flat), "kasa", rank=2)
