"""LoRA-SB: the sandwich against the SVD of the first sign step, and steps inside its subspace."""

import pytest
import torch
from torch import nn

import plait
import tiny
from plait.initializers.lora_sb import LoraSB
from plait.statistics import gradient_pass


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(14, 12)

    def forward(self, x, labels):
        logits = self.lin(x)
        return type("Out", (), {"loss": nn.functional.cross_entropy(logits, labels)})


def data(count=64):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(count, 14, generator=g, dtype=torch.float64)
    return [{"x": x, "labels": torch.randint(12, (count,), generator=g)}]


def net(rank=4, method="lora-sb", start=None, **options):
    torch.manual_seed(1)
    model = Net().double()
    G = full_gradient(model)
    start = start or LoraSB(lr=1e-2, warmup_steps=5)
    adapter = plait.attach(
        model, method, initializer=start, data=data(), rank=rank, seed=2, **options
    )
    return model, adapter.deltas["lin"], G


def full_gradient(model):
    """dL/dW by autograd itself."""
    model.lin.weight.requires_grad_(True)
    (G,) = torch.autograd.grad(model(**data()[0]).loss, model.lin.weight)
    return G


@pytest.mark.parametrize("method", ["lora-sb", "structured-lora"])
def test_the_start_is_the_best_approximation_of_the_first_sign_step(method):
    _, delta, G = net(method=method)
    eye = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(delta.A @ delta.A.T, eye)
    torch.testing.assert_close(delta.B.T @ delta.B, eye)
    U, S, Vh = torch.linalg.svd(-1e-2 / 5 * G.sign())
    best = (U[:, :4] * S[:4]) @ Vh[:4]
    got = torch.linalg.norm(delta.dense() + 2e-3 * G.sign())
    torch.testing.assert_close(got, S[4:].norm(), rtol=1e-3, atol=0)
    torch.testing.assert_close(delta.dense(), best, rtol=0, atol=2e-5)
    assert delta.R.diagonal().diff().le(0).all() and delta.scaling == 1.0


def test_at_full_rank_the_start_is_the_sign_step_itself():
    _, delta, G = net(rank=12)
    torch.testing.assert_close(delta.dense(), -2e-3 * G.sign())


def test_any_alpha_starts_at_the_same_point():
    _, one, _ = net()
    _, other, _ = net(alpha=20.0)
    torch.testing.assert_close(one.dense(), other.dense())


def test_gradient_of_r_is_the_full_gradient_seen_from_the_subspace():
    model, delta, _ = net()
    tiny.scramble(plait.adapters(model)["default"], 0.3)
    model(**data()[0]).loss.backward()
    moved = Net().double()
    moved.load_state_dict(model.state_dict())
    with torch.no_grad():
        moved.lin.weight += delta.dense()
    G = full_gradient(moved)
    torch.testing.assert_close(delta.R.grad, delta.B.T @ G @ delta.A.T)


def test_a_gradient_step_on_r_is_the_projection_of_the_full_step():
    model, delta, _ = net()
    before = delta.dense().detach()
    model(**data()[0]).loss.backward()
    moved = Net().double()
    moved.load_state_dict(model.state_dict())
    with torch.no_grad():
        moved.lin.weight += before
        delta.R -= 0.1 * delta.R.grad
    G = full_gradient(moved)
    step = delta.dense() - before
    torch.testing.assert_close(step, -0.1 * delta.B @ delta.B.T @ G @ delta.A.T @ delta.A)
    # No other step inside {B X A} comes closer to the full one.
    for _ in range(5):
        X = delta.B.T @ step @ delta.A.T + 0.01 * torch.randn(4, 4, dtype=torch.float64)
        assert (delta.B @ X @ delta.A + 0.1 * G).norm() >= (step + 0.1 * G).norm()


def test_only_r_trains_and_counts():
    model = tiny.llama()
    adapter = plait.attach(model, "lora-sb", rank=8, data=[tiny.batch()])
    sites = [d.site for d in adapter.deltas.values()]
    assert adapter.num_parameters() == adapter.method.count(sites, adapter.options) == 64 * 14
    assert {n.rpartition(".")[2] for n, _ in adapter.named_parameters()} == {"R"}


def test_the_gradient_pass_leaves_the_model_as_it_was():
    model = tiny.llama().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" not in name)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    sites = plait.find_sites(model, "all-linear")
    LoraSB().collect(model, sites, [tiny.batch()], 8)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and model.training
    plait.attach(model, "lora-sb", rank=8, data=[tiny.batch()])
    plait.detach(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())


def test_the_loss_is_below_the_bases_at_the_start():
    model = tiny.llama()
    batch = tiny.batch(rows=8)
    before = model(**batch).loss.item()
    plait.attach(model, "lora-sb", rank=16, initializer=LoraSB(lr=2e-3), data=[batch])
    assert model(**batch).loss.item() < before


def test_micro_batches_give_the_same_start():
    model = Net().double()
    (whole,) = data()
    parts = [{k: v[i : i + 16] for k, v in whole.items()} for i in range(0, 64, 16)]
    sites = plait.find_sites(model, ["lin"])
    one, other = (gradient_pass(model, sites, batches)["lin"] for batches in ([whole], parts))
    torch.testing.assert_close(one, other)


def test_averaging_clients_cores_averages_their_changes():
    _, delta, _ = net()
    a = delta.dense().detach()
    R = delta.R.detach().clone()
    with torch.no_grad():
        delta.R.add_(torch.randn(4, 4, dtype=torch.float64))
        b, other = delta.dense(), delta.R.clone()
        delta.R.copy_((R + other) / 2)
    torch.testing.assert_close(delta.dense(), (a + b) / 2)


def test_a_rank_above_the_shorter_side_is_lowered():
    model = tiny.llama()
    adapter = plait.attach(model, "lora-sb", rank=24, data=[tiny.batch()])
    ranks = {p.rpartition(".")[2]: d.rank for p, d in adapter.deltas.items()}
    assert ranks["q_proj"] == 24 and ranks["k_proj"] == 16


def test_training():
    model = tiny.llama()
    start = LoraSB(lr=1e-3)
    data = [tiny.batch(rows=8)]
    adapter = plait.attach(model, "lora-sb", rank=8, initializer=start, data=data, seed=0)
    losses = tiny.losses(model, adapter, lr=2e-2)
    assert losses[-1] < 0.7 * losses[0]


def test_data_and_sound_options_are_asked_for():
    with pytest.raises(plait.PlaitError, match="data="):
        plait.attach(tiny.llama(), "lora-sb")
    for wrong in ({"lr": 0.0}, {"warmup_steps": 0}):
        with pytest.raises(plait.PlaitError, match="lora-sb"):
            LoraSB(**wrong)
