"""NOLA: the regenerated basis, the custom contraction, and what a checkpoint needs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import plait
import tiny
from plait import kernels
from plait.methods import _hashed, nola


def linear(**options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(9, 6)).double()
    adapter = plait.attach(model, "nola", rank=3, k_a=10, k_b=7, seed=2, **options)
    return model, adapter.deltas["0"], adapter


def hashed(key, word):
    """The 32-bit hash in unbounded integers: the oracle of the int32 arithmetic."""
    mask = 2**32 - 1
    x = ((word & mask) ^ (key[0] & mask)) * 0x7FEB352D & mask
    x ^= x >> 15
    x = (x + key[1]) * 0x2C1B3C6D & mask
    x ^= x >> 12
    x = x * 0x297A2D39 & mask
    return x ^ (x >> 15)


def fields(word):
    for half in (word & 0xFFFF, word >> 16):
        yield (half - 0x10000 if half >= 0x8000 else half) / 2**15


def test_the_basis_is_the_hash_bit_for_bit():
    key, size = (-1234567890, 987654321), 5
    got = _hashed.basis(key, 2, 6, size, torch.device("cpu"))
    for row in range(4):
        words = [hashed(key, (2 + row) * 3 + i) for i in range(3)]
        assert got[row].tolist() == [f for w in words for f in fields(w)][:size]


def test_positions_beyond_31_bits_wrap():
    key, size = (3, 4), 2**20
    got = _hashed.basis(key, 5000, 5001, size, torch.device("cpu"))  # word 5000 * 2^19 > 2^31
    assert got[0, :2].tolist() == list(fields(hashed(key, 5000 * 2**19)))


def test_entries_are_uniform_and_uncorrelated():
    X = _hashed.basis((11, 22), 0, 64, 4096, torch.device("cpu")).double()
    assert X.min() >= -1 and X.max() < 1
    assert abs(float(X.mean())) < 4 * (1 / 3 / X.numel()) ** 0.5
    assert float(X.square().mean()) == pytest.approx(1 / 3, rel=0.01)
    histogram = torch.histc(X, 16, -1, 1)
    expected = X.numel() / 16
    assert float(((histogram - expected) ** 2 / expected).sum()) < 45  # chi square, 15 degrees
    gram = X @ X.T / 4096 * 3 - torch.eye(64)
    assert gram.abs().max() < 0.09  # of 2016 pairs with deviation 1/64: under 6 deviations
    shifted = (X[:, 1:] * X[:, :-1]).mean() * 3
    assert abs(float(shifted)) < 5 / X.numel() ** 0.5
    other = _hashed.basis((11, 23), 0, 64, 4096, torch.device("cpu")).double()
    assert abs(float((X * other).mean() * 3)) < 5 / X.numel() ** 0.5


def test_the_contraction_equals_autograd_through_the_dense_basis():
    key, shape = (5, 6), (4, 11)
    c = torch.randn(13, dtype=torch.float64, requires_grad=True)
    g = torch.randn(shape, dtype=torch.float64)
    M = _hashed.basis(key, 0, 13, 44, torch.device("cpu")).double().view(13, *shape) / 13**0.5
    want = torch.einsum("k,kij->ij", c, M)
    got = nola.mix(c, key, shape)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got, c, g)[0], torch.autograd.grad(want, c, g)[0]
    )
    with kernels.use_reference():
        torch.testing.assert_close(nola.mix(c, key, shape), want)
    torch.autograd.gradcheck(lambda c: nola.mix(c, key, shape), [c])


def test_blocks_of_any_size_give_the_same(monkeypatch):
    c = torch.randn(13, dtype=torch.float64)
    whole = nola.mix(c, (5, 6), (4, 11))
    for block in (1, 44, 100, 10**6):
        monkeypatch.setattr(_hashed, "BLOCK", block)
        torch.testing.assert_close(nola.mix(c, (5, 6), (4, 11)), whole)


def test_the_start_is_the_base_model_exactly():
    model = tiny.llama()
    before = tiny.logits(model)
    plait.attach(model, "nola", rank=4, k_a=8, k_b=8)
    assert torch.equal(tiny.logits(model), before)


def test_parameters_do_not_depend_on_rank_or_width():
    for rank in (1, 8):
        model = tiny.llama()
        adapter = plait.attach(model, "nola", rank=rank, k_a=8, k_b=5)
        sites = [d.site for d in adapter.deltas.values()]
        assert adapter.num_parameters() == adapter.method.count(sites, adapter.options) == 13 * 14


def test_the_seed_and_the_coefficients_are_the_whole_adapter():
    model, delta, adapter = linear()
    tiny.scramble(adapter, 0.5)
    assert set(adapter.state_dict()) == {"0.a", "0.b"}
    again, twin, other = linear()
    other.load_state_dict(adapter.state_dict())
    assert torch.equal(twin.dense(), delta.dense())
    x = torch.randn(5, 9, dtype=torch.float64)
    assert torch.equal(again(x), model(x))
    torch.testing.assert_close(
        model(x), F.linear(x, model[0].weight + delta.dense(), model[0].bias)
    )


def test_sites_and_factors_have_bases_of_their_own():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    adapter = plait.attach(model, "nola", rank=6, k_a=4, k_b=4, seed=0)
    keys = [k for d in adapter.deltas.values() for k in d._keys.values()]
    assert len(set(keys)) == 4


def test_rank_of_the_change_is_at_most_r():
    _, delta, adapter = linear()
    tiny.scramble(adapter, 0.5)
    assert torch.linalg.matrix_rank(delta.dense()) == 3


def test_forward_leaves_the_random_state_alone():
    model, _, _ = linear()
    before = torch.get_rng_state()
    model(torch.randn(0, 9, dtype=torch.float64)).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_no_basis_is_kept_for_backward():
    model, _, _ = linear()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        model(torch.randn(2, 9, dtype=torch.float64))
    assert max(shape.numel() for shape in kept) <= 6 * 9  # W; a basis has 10 x 27


def test_training():
    model = tiny.llama()
    adapter = plait.attach(model, "nola", rank=4, k_a=32, k_b=32, seed=0)
    losses = tiny.losses(model, adapter, lr=3e-2)
    assert losses[-1] < 0.7 * losses[0]
