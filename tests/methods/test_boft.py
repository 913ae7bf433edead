"""BOFT: the butterfly, factor by factor as the paper wires it, the scale, and where it fits."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import plait
import tiny


def linear(shape=(24, 6), dtype=torch.float64, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(*shape)).to(dtype)
    adapter = plait.attach(model, "boft", seed=2, **{"block_size": 2, "factors": 2, **options})
    return model, adapter.deltas["0"], adapter


def oracle(delta) -> torch.Tensor:
    """R = F_m .. F_1 from permutation matrices, written with loops."""
    factors, blocks, _ = delta.q.shape
    size, inputs = delta.size, delta.site.in_features
    total = torch.eye(inputs).double()
    for i in range(factors):
        D = torch.zeros(inputs, inputs).double()
        for k in range(blocks):
            Q = torch.zeros(size, size).double()
            Q[tuple(torch.triu_indices(size, size, 1))] = delta.q[i, k].detach()
            Q = Q - Q.T
            eye = torch.eye(size).double()
            span = slice(k * size, (k + 1) * size)
            D[span, span] = (eye + Q) @ torch.linalg.inv(eye - Q)
        chunk, order = size // 2, []
        for start in range(0, inputs // chunk, 2 ** (i + 1)):
            for j in range(2**i):
                order += [start + j, start + 2**i + j]
        places = (
            [c * chunk + k for c in order for k in range(chunk)] if factors > 1 else range(inputs)
        )
        P = torch.zeros(inputs, inputs).double()
        for row, place in enumerate(places):
            P[row, place] = 1
        total = P.T @ D @ P @ total
    return total


@pytest.mark.parametrize(("size", "factors"), [(3, 1), (2, 2), (2, 3), (4, 2), (6, 3)])
def test_the_weight_is_turned_by_the_butterfly_and_scaled(size, factors):
    model, delta, adapter = linear(block_size=size, factors=factors)
    tiny.scramble(adapter, 0.4)
    R = oracle(delta)
    torch.testing.assert_close(R @ R.T, torch.eye(24).double())
    W = model[0].weight.detach()
    moved = delta.s.detach()[:, None] * (W @ R.T)
    torch.testing.assert_close((W + delta.dense()).detach(), moved)
    x = torch.randn(2, 5, 24).double()
    torch.testing.assert_close(model(x), F.linear(x, moved, model[0].bias))


def test_the_butterfly_reaches_as_far_as_it_should():
    _, delta, adapter = linear(block_size=2, factors=3)
    tiny.scramble(adapter, 0.4)
    R = oracle(delta)
    reach = torch.block_diag(*[torch.ones(8, 8)] * 3).bool()
    assert (R[reach].abs() > 1e-6).all() and not R[~reach].any()


def test_it_starts_at_the_base():
    model, delta, _ = linear()
    x = torch.randn(4, 24).double()
    assert torch.equal(model(x), delta.site.forward(x)) and not delta.dense().any()


def test_with_one_factor_and_no_scale_it_is_oft():
    model, delta, adapter = linear(block_size=4, factors=1)
    tiny.scramble(adapter, 0.4)
    other = nn.Sequential(nn.Linear(24, 6)).double()
    other.load_state_dict(model.state_dict())
    oft = plait.attach(other, "oft", block_size=4, terms=None).deltas["0"]
    with torch.no_grad():
        delta.s.fill_(1.0)
        oft.q.copy_(delta.q[0])
    x = torch.randn(4, 24).double()
    torch.testing.assert_close(model(x), other(x))


def test_convolutions_are_linears_on_their_patches():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, padding=1, stride=2).double()
    model = nn.Sequential(conv)
    adapter = plait.attach(model, "boft", targets="all-conv", block_size=2, factors=2)
    tiny.scramble(adapter, 0.4)
    delta = adapter.deltas["0"]
    W = delta.s.detach()[:, None] * (conv.weight.detach().flatten(1) @ oracle(delta).T)
    x = torch.randn(2, 4, 6, 6).double()
    patches = F.unfold(x, 3, padding=1, stride=2).mT
    wanted = F.linear(patches, W, conv.bias).mT.reshape(2, 8, 3, 3)
    torch.testing.assert_close(model(x), wanted)


def test_factors_are_as_many_as_divide_a_sites_inputs():
    for inputs, size, wanted in [(24, 2, (3, 12, 2)), (20, 4, (1, 5, 4)), (18, 4, (1, 6, 3))]:
        _, delta, adapter = linear(shape=(inputs, 6), block_size=size, factors=3)
        assert delta.options.shape(delta.site) == wanted
        count = adapter.method.count([delta.site], delta.options)
        factors, blocks, size = wanted
        assert adapter.num_parameters() == count == factors * blocks * size * (size - 1) // 2 + 6
    with pytest.raises(plait.PlaitError, match="block_size"):
        linear(shape=(7, 6))
    with pytest.raises(plait.PlaitError, match="factors"):
        linear(factors=0)


def test_training():
    model = tiny.llama()
    adapter = plait.attach(model, "boft", block_size=4, factors=3, seed=0)
    losses = tiny.losses(model, adapter)
    assert losses[-1] < 0.8 * losses[0]
