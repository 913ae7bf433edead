"""HRA: the chain of reflections against their product, its rank, and its two ends."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import plait
import tiny


def linear(shape=(9, 6), dtype=torch.float64, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(*shape)).to(dtype)
    adapter = plait.attach(model, "hra", seed=2, **{"rank": 4, **options})
    return model, adapter.deltas["0"], adapter


def chain(delta) -> torch.Tensor:
    """H_1 H_2 .. H_r, one dense reflection after the other."""
    total = torch.eye(delta.site.in_features).double()
    for u in delta.U.detach().double().T:
        total = total @ (torch.eye(len(u)) - 2 * torch.outer(u, u) / u.dot(u))
    return total


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 7])
def test_the_weight_is_reflected_by_the_whole_chain(rank):
    model, delta, adapter = linear(rank=rank)
    tiny.scramble(adapter, 0.5)
    W, H = model[0].weight.detach(), chain(delta)
    torch.testing.assert_close((W + delta.dense()).detach(), W @ H)
    assert delta.factors().rank == rank
    x = torch.randn(2, 5, 9).double()
    torch.testing.assert_close(model(x), F.linear(x, W @ H, model[0].bias))


def test_angles_lengths_and_singular_values_stay():
    model, delta, adapter = linear(shape=(9, 20))
    tiny.scramble(adapter, 0.5)
    W = model[0].weight.detach()
    moved = (W + delta.dense()).detach()
    torch.testing.assert_close(moved @ moved.T, W @ W.T)
    torch.testing.assert_close(torch.linalg.svdvals(moved), torch.linalg.svdvals(W))


def test_equal_neighbours_cancel_at_the_start_and_yet_learn():
    model, delta, _ = linear(rank=6)
    assert delta.traits.zero_start
    assert torch.equal(delta.U[:, ::2], delta.U[:, 1::2])
    assert delta.dense().abs().max() < 1e-12
    model(torch.randn(8, 9).double()).square().sum().backward()
    gradient = delta.U.grad
    torch.testing.assert_close(gradient[:, ::2], -gradient[:, 1::2])
    assert gradient.abs().amin(0).max() > 1e-3


def test_an_odd_or_orthogonal_chain_says_that_it_starts_elsewhere():
    for options in ({"rank": 3}, {"orthogonal": True}):
        model, delta, _ = linear(**options)
        assert not delta.traits.zero_start
        assert delta.dense().norm() > 0.1 * model[0].weight.norm()


def test_orthogonal_reflections_are_those_of_the_orthonormalised_columns():
    model, delta, adapter = linear(orthogonal=True)
    tiny.scramble(adapter, 0.5)
    columns = []  # Gram-Schmidt, by the book
    for u in delta.U.detach().T:
        for c in columns:
            u = u - c.dot(u) * c
        columns.append(u / u.norm())
    V, W = torch.stack(columns, 1), model[0].weight.detach()
    torch.testing.assert_close((W + delta.dense()).detach(), W - 2 * W @ V @ V.T)
    with pytest.raises(plait.PlaitError, match="too few"):
        linear(rank=10, orthogonal=True)


def test_lengths_of_the_vectors_do_not_matter():
    _, delta, adapter = linear()
    tiny.scramble(adapter, 0.5)
    before = delta.dense().detach()
    with torch.no_grad():
        delta.U.mul_(torch.tensor([3.0, 0.01, 1.0, 20.0]))
    torch.testing.assert_close(delta.dense().detach(), before)


def test_the_regulariser_is_the_distance_from_orthonormal_unit_columns():
    model, delta, adapter = linear(regularizer=0.5)
    tiny.scramble(adapter, 0.5)
    unit = F.normalize(delta.U.detach(), dim=0)
    wanted = 0.5 * (unit.T @ unit - torch.eye(4)).norm()
    torch.testing.assert_close(plait.auxiliary_loss(model).detach(), wanted)
    _, silent, _ = linear()
    assert type(silent).auxiliary_loss([silent], silent.context) is None


def test_convolutions_are_linears_on_their_patches():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 5, 3, padding=1).double()
    model = nn.Sequential(conv)
    adapter = plait.attach(model, "hra", targets="all-conv", rank=4)
    tiny.scramble(adapter, 0.5)
    W = conv.weight.detach().flatten(1) @ chain(adapter.deltas["0"])
    x = torch.randn(2, 2, 4, 4).double()
    wanted = F.conv2d(x, W.view_as(conv.weight), conv.bias, padding=1)
    torch.testing.assert_close(model(x), wanted)


def test_no_square_matrix_is_kept_and_x_once():
    model, _, _ = linear(shape=(64, 8), dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(3, 64))
    assert max(t.numel() for t in kept) <= 64 * 8


def test_counts_and_training():
    model = tiny.llama()
    adapter = plait.attach(model, "hra", rank=8, seed=0)
    sites = [d.site for d in adapter.deltas.values()]
    wanted = 8 * sum(s.in_features for s in sites)
    assert adapter.num_parameters() == adapter.method.count(sites, adapter.options) == wanted
    losses = tiny.losses(model, adapter, lr=3e-2)
    assert losses[-1] < 0.8 * losses[0]


def test_autocast_does_not_loosen_the_chain():
    model, delta, adapter = linear(shape=(64, 32), dtype=torch.float32)
    tiny.scramble(adapter, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        inside = delta.factors()
    inside = inside.dense()
    torch.testing.assert_close(inside, delta.dense())
    moved = (model[0].weight + inside).detach().double()
    W = model[0].weight.detach().double()
    torch.testing.assert_close(moved @ moved.T, W @ W.T, atol=1e-5, rtol=1e-4)
