"""RandLoRA: the sum of products written out, both ways to multiply, and what is kept."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import plait
import tiny
from plait import kernels

SHAPES = [(9, 6), (6, 9), (8, 8)]  # (in, out)


def linear(inputs, outputs, rank=4, dtype=torch.float64, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(inputs, outputs)).to(dtype)
    adapter = plait.attach(model, "randlora", rank=rank, alpha=6.0, seed=2, **options)
    tiny.scramble(adapter, 0.5)
    return model, adapter.deltas["0"], adapter


def written_out(delta, lam, gamma):
    """s sum_j B_j diag(lam_j) A diag(gamma_j), one term after the other."""
    count, small = gamma.shape
    large, rank = max(delta.site.shape), lam.shape[0]
    A = delta.shared["A"][:, 0, :small].double()
    B = delta.shared["B"][:large, :count].reshape(large, -1).double()
    total = 0
    for j in range(count):
        B_j = torch.stack([B[:, k * count + j] for k in range(rank)], 1)
        total = total + B_j @ torch.diag(lam[:, j]) @ A @ torch.diag(gamma[j])
    total = total * 6.0 / rank
    return total if delta.site.in_features == small else total.t()


@pytest.mark.parametrize("few", [True, False], ids=["few tokens", "many tokens"])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_equal_the_sum_written_out(shape, few):
    model, delta, _ = linear(*shape)
    x = torch.randn(2 if few else 30, shape[0], dtype=torch.float64, requires_grad=True)
    g = torch.randn(len(x), shape[1], dtype=torch.float64)
    assert delta._few(x) == few
    tensors = [x, delta.lam, delta.gamma]
    total = model[0].weight + written_out(delta, delta.lam, delta.gamma)
    want = F.linear(x, total, model[0].bias)
    got = model(x)
    torch.testing.assert_close(got, want)
    wanted = torch.autograd.grad(want, tensors, g)
    for a, b in zip(torch.autograd.grad(got, tensors, g), wanted, strict=True):
        torch.testing.assert_close(a, b)
    with kernels.use_reference():
        torch.testing.assert_close(model(x), want)
    torch.testing.assert_close(delta(x), x @ delta.dense().t())


def test_the_change_has_full_rank():
    for inputs, outputs in SHAPES:
        _, delta, _ = linear(inputs, outputs, rank=3)
        assert torch.linalg.matrix_rank(delta.dense()) == min(inputs, outputs)


def test_one_basis_is_vera_with_both_its_vectors_on_the_inside():
    _, delta, _ = linear(9, 6, rank=6)
    assert delta.gamma.shape == (1, 6)
    A, B = delta.shared["A"][:, 0].double(), delta.shared["B"][:, 0].double()
    want = B @ torch.diag(delta.lam[:, 0]) @ A @ torch.diag(delta.gamma[0])
    torch.testing.assert_close(delta.dense(), want.t())


def test_the_start_is_the_base_model_exactly_and_learns():
    model = tiny.llama()
    before = tiny.logits(model)
    adapter = plait.attach(model, "randlora", rank=8, alpha=8.0)
    assert torch.equal(tiny.logits(model), before)
    delta = next(iter(adapter.deltas.values()))
    assert not delta.lam.any() and torch.all(delta.gamma == 1 / max(delta.gamma.shape))
    losses = tiny.losses(model, adapter, lr=1e-2)
    assert losses[-1] < 0.8 * losses[0]


def test_counts_are_those_of_the_paper():
    model = tiny.llama()
    adapter = plait.attach(model, "randlora", rank=5)
    sites = [d.site for d in adapter.deltas.values()]
    small = [min(s.shape) for s in sites]
    want = sum(-(-m // 5) * (5 + m) for m in small)
    assert adapter.num_parameters() == adapter.method.count(sites, adapter.options) == want


def test_bases_are_one_pair_from_the_seed_and_never_stored():
    one, two = (plait.attach(tiny.llama(), "randlora", rank=5, seed=3) for _ in range(2))
    assert set(one.shared.state_dict()) == set()
    for name in "AB":
        assert torch.equal(one.shared[name], two.shared[name])
        assert abs(float(one.shared[name].std()) - 1) < 0.1
    places = {d._bases()[1].data_ptr() for d in one.deltas.values()}
    assert places == {one.shared["B"].data_ptr()}


@pytest.mark.parametrize(("bases", "s"), [("sparse", 3.0), ("very-sparse", 48**0.5)])
def test_sparse_bases_are_ternary(bases, s):
    adapter = plait.attach(tiny.llama(), "randlora", rank=2, bases=bases, seed=3)
    B = adapter.shared["B"]
    values = B.unique()
    torch.testing.assert_close(values, torch.tensor([-(s**0.5), 0.0, s**0.5]))
    share = float((B != 0).float().mean())
    assert abs(share - 1 / s) < 5 * (share / B.numel()) ** 0.5


@pytest.mark.parametrize("tokens", [8, 64])
def test_backward_keeps_neither_bases_nor_mixtures(tokens):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(40, 80))
    adapter = plait.attach(model, "randlora", rank=4)
    shared = {adapter.shared[n].data_ptr() for n in "AB"} | {model[0].weight.data_ptr()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(tokens, 40))
    own = [t for t in kept if t.data_ptr() not in shared]
    # x, the two diagonals, and W + dW where it is no larger than y
    assert max(t.numel() for t in own) <= max(tokens * 80, 10 * 40)


def test_ranks_are_the_same_at_all_sites():
    with pytest.raises(plait.PlaitError, match="shared bases"):
        plait.attach(tiny.llama(), "randlora", rank=8, overrides={"q_proj": {"rank": 4}})
