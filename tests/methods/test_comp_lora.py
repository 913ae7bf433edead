"""Comp-LoRA: what it protects stays, by an SVD of its own; the rest is LoRA's formula."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import plait
import tiny
from plait.errors import PlaitError

SHAPES = [(9, 6), (6, 9), (8, 8)]


def linear(shape=(9, 6), size=0.5, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(*shape)).double()
    adapter = plait.attach(model, "comp-lora", seed=2, **{"rank": 2, **options})
    if size:
        tiny.scramble(adapter, size)
    return model, adapter.deltas["0"], adapter


def projector(W, k, side):
    """I - V_k V_k^T (input) or I - U_k U_k^T, from eigenvectors of the Gram matrix."""
    gram = W.T @ W if side == "input" else W @ W.T
    top = torch.linalg.eigh(gram).eigenvectors.flip(-1)[:, :k]
    return torch.eye(len(gram), dtype=W.dtype) - top @ top.T


def test_the_start_is_the_base_model_exactly():
    model = tiny.llama()
    before = tiny.logits(model)
    plait.attach(model, "comp-lora")
    assert torch.equal(tiny.logits(model), before)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["both", "output", "input"])
@pytest.mark.parametrize("k", [1, 5])
def test_dense_is_the_projected_product(shape, side, k):
    model, delta, _ = linear(shape, side=side, protect=k)
    W = model[0].weight.detach()
    left = projector(W, k, "output") if side != "input" else torch.eye(shape[1]).double()
    right = projector(W, k, "input") if side != "output" else torch.eye(shape[0]).double()
    wanted = delta.scaling * left @ delta.B @ delta.A @ right
    torch.testing.assert_close(delta.dense(), wanted, rtol=1e-9, atol=1e-10)
    x = torch.randn(5, shape[0]).double()
    torch.testing.assert_close(model(x), F.linear(x, W + wanted, model[0].bias))


@pytest.mark.parametrize("shape", SHAPES)
def test_leading_triplets_of_w_stay_triplets(shape):
    k = 3
    model, delta, _ = linear(shape, protect=k)
    W, dW = model[0].weight.detach(), delta.dense().detach()
    U, S, Vh = torch.linalg.svd(W)
    assert dW.abs().max() > 0.1
    assert (U[:, :k].T @ dW).abs().max() < 1e-12 and (dW @ Vh[:k].T).abs().max() < 1e-12
    torch.testing.assert_close((W + dW) @ Vh[:k].T, U[:, :k] * S[:k])
    torch.testing.assert_close((W + dW).T @ U[:, :k], Vh[:k].T * S[:k])
    plait.fuse(model)
    torch.testing.assert_close(model[0].weight @ Vh[:k].T, U[:, :k] * S[:k])


def test_nothing_protected_is_lora():
    model, delta, _ = linear(protect=0, size=0.0)
    other = nn.Sequential(nn.Linear(9, 6)).double()
    other.load_state_dict(model.state_dict())
    lora = plait.attach(other, "lora", rank=2, seed=2).deltas["0"]
    assert torch.equal(lora.A, delta.A)
    with torch.no_grad():
        lora.B.normal_()
        delta.B.copy_(lora.B)
    x = torch.randn(4, 9).double()
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.95])
def test_energy_protects_the_fewest_directions_that_carry_it(energy):
    model, delta, _ = linear((8, 8), energy=energy)
    share = torch.linalg.svdvals(model[0].weight.detach()).square()
    share = share.cumsum(0) / share.sum()
    k = next(i for i in range(1, 9) if share[i - 1] >= energy)
    free = 8 - torch.linalg.matrix_rank(torch.eye(8).double() - projector_of(delta, "input"))
    assert free == 8 - k
    assert len(delta.get_buffer("input")) == min(k, 8 - k)


def projector_of(delta, side):
    return delta.project(torch.eye(8, dtype=torch.float64), side)


def test_sgd_is_lora_with_projected_gradients():
    model, delta, adapter = linear((9, 6), protect=2, size=0.0)
    W, bias = model[0].weight.detach(), model[0].bias.detach()
    left, right = projector(W, 2, "output"), projector(W, 2, "input")
    A, B = (delta.A.detach() @ right).requires_grad_(), delta.B.detach().clone().requires_grad_()
    ours = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for step in range(8):
        g = torch.Generator().manual_seed(step)
        x = torch.randn(4, 9, dtype=torch.float64, generator=g)
        ours.zero_grad()
        model(x).square().mean().backward()
        ours.step()
        loss = F.linear(x, W + delta.scaling * B @ A, bias).square().mean()
        grad_A, grad_B = torch.autograd.grad(loss, [A, B])
        with torch.no_grad():
            A -= 0.1 * grad_A @ right
            B -= 0.1 * left @ grad_B
    assert (delta.scaling * B @ A).abs().max() > 1e-3
    torch.testing.assert_close(delta.dense(), delta.scaling * B @ A)


def test_only_a_and_b_are_stored_and_a_file_gives_the_same_model(tmp_path):
    model = tiny.llama()
    adapter = plait.attach(model, "comp-lora", rank=2)
    tiny.scramble(adapter)
    assert {name.rpartition(".")[2] for name in adapter.state_dict()} == {"A", "B"}
    sites = [d.site for d in adapter.deltas.values()]
    assert adapter.num_parameters() == adapter.method.count(sites, adapter.options)
    wanted = tiny.logits(model)
    adapter.save(tmp_path / "a")
    fresh = tiny.llama()
    plait.load(fresh, tmp_path / "a")
    torch.testing.assert_close(tiny.logits(fresh), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(PlaitError, match="not attached"):
        plait.read_adapter(tmp_path / "a").to_lora()


def test_rules_over_pairs_are_refused_and_impossible_options_too():
    model = tiny.llama()
    plait.attach(model, "comp-lora")
    with pytest.raises(PlaitError, match="pairs"):
        plait.RuleStack(model, ["lora-pro"])
    for wrong in ({"side": "left"}, {"energy": 1.0}):
        with pytest.raises(PlaitError):
            linear(**wrong)
    with pytest.raises(PlaitError, match="choose 0 to 5"):
        linear(protect=6)


def test_training():
    model = tiny.llama()
    losses = tiny.losses(model, plait.attach(model, "comp-lora", energy=0.5, seed=0))
    assert losses[-1] < 0.8 * losses[0]
