"""VB-LoRA: pieces mixed from one bank, written out one by one."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import plait
import tiny

SIZES = {"rank": 2, "vectors": 7, "length": 3}


def two_layers(**options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(9, 6), nn.Linear(6, 12)).double()
    adapter = plait.attach(model, "vblora", seed=2, bound=0.5, deviation=1.0, **SIZES, **options)
    return model, adapter


def piece(logits, bank, chosen):
    """The softmax mix of the bank vectors with the largest logits."""
    best = sorted(range(len(logits)), key=lambda i: -float(logits[i].detach()))[:chosen]
    weights = torch.exp(torch.stack([logits[i] for i in best]))
    weights = weights / weights.sum()
    return sum(w * bank[i] for w, i in zip(weights, best, strict=True))


def written_out(delta, bank, chosen=2):
    rows = [torch.cat([piece(p, bank, chosen) for p in row]) for row in delta.logits_A]
    columns = [
        torch.cat([piece(delta.logits_B[i, k], bank, chosen) for i in range(len(delta.logits_B))])
        for k in range(delta.logits_B.shape[1])
    ]
    return sum(torch.outer(b, a) for b, a in zip(columns, rows, strict=True))


@pytest.mark.parametrize("chosen", [1, 2, 7])
def test_output_and_gradients_equal_the_pieces_written_out(chosen):
    model, adapter = two_layers(chosen=chosen)
    delta, bank = adapter.deltas["0"], adapter.shared["bank"]
    x = torch.randn(5, 9, dtype=torch.float64)
    g = torch.randn(5, 6, dtype=torch.float64)
    dW = written_out(delta, bank, chosen)
    want = F.linear(x, model[0].weight + dW, model[0].bias)
    got = model[0](x)
    torch.testing.assert_close(got, want)
    tensors = [bank, delta.logits_A, delta.logits_B]
    wanted = torch.autograd.grad(want, tensors, g)
    for a, b in zip(torch.autograd.grad(got, tensors, g), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_only_the_chosen_logits_get_a_gradient():
    model, adapter = two_layers()
    model[0](torch.randn(5, 9, dtype=torch.float64)).square().sum().backward()
    gradient = adapter.deltas["0"].logits_A.grad
    assert ((gradient != 0).sum(-1) == 2).all()


def test_a_choice_changes_with_its_logit():
    _, adapter = two_layers()
    delta, bank = adapter.deltas["0"], adapter.shared["bank"]
    with torch.no_grad():
        delta.logits_A[0, 0] = torch.tensor([3.0, 2, 0, 0, 0, 0, 0])
        delta.logits_A[0, 0, 5] = 40.0
    torch.testing.assert_close(delta.factors().A[0, :3], bank[5], rtol=1e-9, atol=1e-9)


def test_one_bank_serves_all_sites_and_counts_once():
    model, adapter = two_layers()
    assert [n for n, _ in adapter.shared.named_parameters()] == ["bank"]
    model(torch.randn(5, 9, dtype=torch.float64)).square().sum().backward()
    assert adapter.shared["bank"].grad.any()
    pieces = (9 + 6 + 6 + 12) // 3
    sites = [d.site for d in adapter.deltas.values()]
    want = 7 * 3 + 2 * 7 * pieces
    assert adapter.num_parameters() == adapter.method.count(sites, adapter.options) == want


def test_sides_that_the_length_does_not_divide_are_refused():
    model = nn.Sequential(nn.Linear(9, 8))
    with pytest.raises(plait.PlaitError, match=r"length=3 does not divide .*8 x 9"):
        plait.attach(model, "vblora", **SIZES)


def test_the_bank_is_the_same_for_all_sites():
    with pytest.raises(plait.PlaitError, match="bank"):
        two_layers(overrides={"1": {"vectors": 5}})


def test_the_start_is_near_the_base_model_and_learns():
    model = tiny.llama()
    before = tiny.logits(model)
    adapter = plait.attach(model, "vblora", rank=4, vectors=16, length=16, seed=0)
    moved = (tiny.logits(model) - before).abs().max()
    assert 0 < moved < 0.05 * before.abs().max()
    losses = tiny.losses(model, adapter, lr=2e-2)
    assert losses[-1] < 0.8 * losses[0]


def test_the_length_suits_all_sites_where_none_is_given():
    model = nn.Sequential(nn.Linear(576, 192), nn.Linear(192, 640))
    adapter = plait.attach(model, "vblora", targets="all-linear", seed=0)
    assert adapter.deltas["0"].shared["bank"].shape == (256, 64)
    sites = [d.site for d in adapter.deltas.values()]
    assert adapter.num_parameters() == adapter.method.count(sites, adapter.options)
