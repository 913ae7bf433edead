"""LoLDU: W's elimination, what the trained numbers change, and starts beside the base."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import plait
import tiny
from plait.methods._elimination import choose_pivots, eliminate


def linear(rank=3, shape=(9, 6), dtype=torch.float64, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(*shape)).to(dtype)
    adapter = plait.attach(model, "loldu", rank=rank, seed=2, **options)
    return model, adapter.deltas["0"], adapter


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_the_factors_are_torchs_own(shape):
    W = torch.randn(shape, dtype=torch.float64)
    P, L0, U0 = torch.linalg.lu(W)
    for rank in (1, 3, 5):
        L, D, U = eliminate(W, choose_pivots(W, rank))
        torch.testing.assert_close(L, (P @ L0)[:, :rank])
        torch.testing.assert_close(D, U0.diagonal()[:rank])
        torch.testing.assert_close(D[:, None] * U, U0[:rank])


def test_all_of_them_make_up_W():
    W = torch.randn(6, 9, dtype=torch.float64)
    L, D, U = eliminate(W, choose_pivots(W, 6))
    torch.testing.assert_close((L * D) @ U, W)
    assert L.abs().max() <= 1  # partial pivoting


def test_a_pivot_of_nothing_stays_harmless():
    W = torch.randn(6, 6)
    W[:, 2] = W[:, 0] + W[:, 1]
    _, D, U = eliminate(W, choose_pivots(W, 4))
    assert D[2].abs() < 1e-6 and U.abs().max() < 100
    L, D, U = eliminate(torch.zeros(4, 5), choose_pivots(torch.zeros(4, 5), 3))
    assert torch.isfinite(L).all() and not U.any() and not D.any()


def test_dw_is_the_scaled_product_and_its_gradient_the_formula():
    model, delta, adapter = linear(alpha=6.0)
    tiny.scramble(adapter, 0.5)
    L, U = delta.L, delta.U
    torch.testing.assert_close(delta.dense(), 2.0 * L @ torch.diag(delta.d) @ U)
    x, g = torch.randn(7, 9, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)
    model(x).backward(g)
    torch.testing.assert_close(delta.d.grad, 2.0 * torch.einsum("or,oi,ri->r", L, g.T @ x, U))


def test_lu_starts_at_the_base_and_the_other_starts_where_they_say():
    _, delta, _ = linear()
    assert not delta.dense().any()
    for start, z in {
        "zeros": 0 * delta.D,
        "ones": delta.D**0,
        "mean": 0 * delta.D + delta.D.mean(),
    }.items():
        _, other, _ = linear(start=start)
        torch.testing.assert_close(other.D + other.d, z)
        torch.testing.assert_close(other.dense(), delta.L @ torch.diag(z - delta.D) @ delta.U)
    for start in ("uniform", "normal"):
        _, other, _ = linear(start=start)
        assert other.dense().any() and not other.traits.zero_start


def test_uniform_and_normal_have_the_spread_of_the_pivots():
    _, uniform, _ = linear(rank=300, shape=(300, 300), start="uniform")
    z, mean = uniform.D + uniform.d, uniform.D.mean().abs() / 2
    assert z.abs().max() <= mean and z.abs().max() > 0.9 * mean
    _, normal, _ = linear(rank=300, shape=(300, 300), start="normal")
    assert abs(float((normal.D + normal.d).detach().std() / normal.D.std()) - 1) < 0.2


def test_a_file_holds_the_numbers_and_the_pivots_and_obeys_them(tmp_path):
    """On a base whose own elimination would take other rows, the stored order is kept."""
    model, delta, adapter = linear()
    tiny.scramble(adapter, 0.5)
    assert set(adapter.state_dict()) == {"0.d", "0.pivots"}
    adapter.save(tmp_path / "a")
    plait.detach(model)
    with torch.no_grad():
        last = next(i for i in range(6) if i not in delta.pivots.tolist())
        model[0].weight[last] = 1.001 * model[0].weight[delta.pivots[0].long()]
    assert choose_pivots(model[0].weight, 3)[0] == last
    again = plait.load(model, tmp_path / "a").deltas["0"]
    assert torch.equal(again.pivots, delta.pivots)
    torch.testing.assert_close(again.U, delta.U)


def test_a_full_rank_adapter_can_replace_W_altogether():
    model, delta, _ = linear(rank=6)
    with torch.no_grad():
        delta.d.copy_(-delta.D)
    x = torch.randn(4, 9, dtype=torch.float64)
    torch.testing.assert_close(model(x), model[0].bias.expand(4, -1))


def test_backward_keeps_no_input():
    model, _, _ = linear(dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        model(torch.randn(100, 9))
    assert max(shape.numel() for shape in kept) <= 3 * 100


def test_counts_refusals_and_training():
    model = tiny.llama()
    adapter = plait.attach(model, "loldu", rank=8, seed=0)
    sites = [d.site for d in adapter.deltas.values()]
    assert adapter.num_parameters() == adapter.method.count(sites, adapter.options) == 8 * 14
    losses = tiny.losses(model, adapter, lr=0.1)
    assert losses[-1] < 0.9 * losses[0]
    with pytest.raises(plait.PlaitError, match="shorter side"):
        linear(rank=7)
    with pytest.raises(plait.PlaitError, match="start"):
        linear(start="svd")


def test_forward_of_a_wide_layer_is_the_linear_of_its_weight():
    model, delta, adapter = linear(shape=(4, 8))
    tiny.scramble(adapter, 0.5)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    wanted = F.linear(x, model[0].weight + delta.dense(), model[0].bias)
    torch.testing.assert_close(model(x), wanted)
