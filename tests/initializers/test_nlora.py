"""NLoRA and IntTune: slices of W, Nyström's exactness, and where the model starts."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import plait
import tiny
from plait.initializers.nlora import Nystrom


def linear(W=None, method="nlora", rank=3, start=None, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(9, 7)).double()
    if W is not None:
        model[0].weight.data = W
    adapter = plait.attach(model, method, rank=rank, initializer=start, seed=2, **options)
    return model, adapter.deltas["0"], adapter


@pytest.mark.parametrize("method", ["nlora", "int-tune", "lora-xs"])
def test_factors_are_rows_columns_and_corner(method):
    model, delta, _ = linear(method=method, start=Nystrom())
    W = model[0].weight
    assert torch.equal(delta.A, W[:3]) and torch.equal(delta.B, W[:, :3])
    assert torch.equal(delta.R, W[:3, :3])


@pytest.mark.parametrize("indices", ["random", "largest"])
def test_other_rows_and_columns_meet_in_their_corner(indices):
    model, delta, _ = linear(start=Nystrom(indices=indices))
    W = model[0].weight.detach()
    rows = [i for a in delta.A for i in range(7) if torch.equal(a, W[i])]
    columns = [j for b in delta.B.T for j in range(9) if torch.equal(b, W[:, j])]
    assert len(set(rows)) == len(set(columns)) == 3
    assert torch.equal(delta.R, W[rows][:, columns])
    if indices == "largest":
        assert rows == sorted(W.norm(dim=1).topk(3).indices.tolist())
        assert columns == sorted(W.norm(dim=0).topk(3).indices.tolist())
    else:
        _, again, _ = linear(start=Nystrom(indices=indices))
        assert torch.equal(again.A, delta.A)


def test_the_pseudo_inverse_reconstructs_a_matrix_of_that_rank_exactly():
    g = torch.Generator().manual_seed(0)
    W = torch.randn(7, 3, generator=g).double() @ torch.randn(3, 9, generator=g).double()
    _, delta, _ = linear(W, start=Nystrom(middle="pinv"), alpha=12.0)
    torch.testing.assert_close(delta.trained().dense(), W, rtol=0, atol=1e-8)


@pytest.mark.parametrize("middle", ["corner", "pinv"])
@pytest.mark.parametrize("method", ["nlora", "int-tune"])
def test_the_model_starts_at_the_base_and_the_base_is_untouched(method, middle):
    model = tiny.llama()
    before, weights = tiny.logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    adapter = plait.attach(model, method, rank=6, initializer=Nystrom(middle=middle))
    torch.testing.assert_close(tiny.logits(model), before, rtol=1e-4, atol=1e-4)
    tiny.losses(model, adapter, steps=2, lr=1e-4)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_the_authors_start_is_small_for_trained_weights_and_grows_with_their_cube():
    g = torch.Generator().manual_seed(0)
    W = 0.02 * torch.randn(256, 256, generator=g, dtype=torch.float64)
    shares = {}
    for size in (1.0, 10.0):
        model = nn.Sequential(nn.Linear(256, 256, bias=False)).double()
        model[0].weight.data = size * W
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapter = plait.attach(model, "nlora", rank=32, initializer=Nystrom(residual=False))
        change = adapter.deltas["0"].dense().detach()
        C, K, R = (size * W[:, :32], size * W[:32, :32], size * W[:32])
        torch.testing.assert_close(change, C @ K @ R)
        shares[size] = float(change.norm() / (size * W).norm())
        assert bool(caught) == (shares[size] > 0.1)
        assert not caught or "residual=True" in str(caught[0].message)
    assert shares[1.0] < 0.03
    assert shares[10.0] == pytest.approx(100 * shares[1.0])  # the cube, over the weights' own size


def test_forward_is_w_plus_the_change_since_the_start():
    model, delta, adapter = linear()
    start = (delta.B @ delta.R @ delta.A).detach()
    tiny.scramble(adapter, 0.5)
    x = torch.randn(5, 9, dtype=torch.float64)
    W = model[0].weight - start + delta.B @ delta.R @ delta.A
    torch.testing.assert_close(model(x), F.linear(x, W, model[0].bias))


def test_inttune_trains_only_the_middle():
    _, delta, adapter = linear(method="int-tune")
    assert [n for n, _ in adapter.named_parameters()] == ["0.R"]
    assert adapter.num_parameters() == 9 == adapter.method.count([delta.site], delta.options)
    assert delta.scaling == 1.0


def test_inttune_moves_by_the_change_of_the_middle_between_the_slices():
    model, delta, adapter = linear(method="int-tune")
    W, K = model[0].weight.detach(), delta.R.detach().clone()
    x = torch.randn(5, 9, dtype=torch.float64)
    assert torch.equal(model(x), F.linear(x, W, model[0].bias))
    tiny.scramble(adapter, 0.5)
    change = W[:, :3] @ (delta.R - K) @ W[:3]
    torch.testing.assert_close(model(x), F.linear(x, W + change, model[0].bias))
    assert adapter.to_lora().deltas["0"].rank == 3
    _, beside, _ = linear(method="int-tune", start=Nystrom(residual=False))
    torch.testing.assert_close(beside.dense(), W[:, :3] @ K @ W[:3])


def test_a_rank_above_the_shorter_side_is_lowered():
    model = tiny.llama()
    adapter = plait.attach(model, "nlora", rank=24)
    ranks = {p.rpartition(".")[2]: d.rank for p, d in adapter.deltas.items()}
    assert ranks["q_proj"] == 24 and ranks["k_proj"] == 16
    assert {d.scaling for d in adapter.deltas.values()} == {1.0}


@pytest.mark.parametrize(("method", "lr"), [("nlora", 3e-3), ("int-tune", 1e-2)])
def test_training(method, lr):
    model = tiny.llama()
    adapter = plait.attach(model, method, rank=8, seed=0)
    losses = tiny.losses(model, adapter, lr=lr)
    assert losses[-1] < 0.8 * losses[0]


def test_methods_without_a_middle_and_wrong_options_are_refused():
    with pytest.raises(plait.PlaitError, match="structured-lora"):
        linear(method="lora", start="nlora")
    with pytest.raises(plait.PlaitError, match="middle"):
        Nystrom(middle="inverse")
