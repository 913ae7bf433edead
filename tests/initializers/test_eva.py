"""EVA: the inputs' singular vectors, shared where inputs are, and ranks by explained share."""

import pytest
import torch
from torch import nn

import plait
import tiny
from plait.initializers.eva import Eva, redistribute
from plait.statistics import Sketch


def site_inputs(model, batch, path):
    """What the site reads, by a plain hook: the oracle's data."""
    found = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda m, a: found.append(a[0]))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return found[0].flatten(0, -2)


def test_the_start_is_the_base_model_exactly():
    model = tiny.llama()
    before = tiny.logits(model)
    plait.attach(model, "eva", rank=4, data=[tiny.batch()])
    assert torch.equal(tiny.logits(model), before)


def test_a_is_the_right_singular_vectors_of_the_inputs():
    model = tiny.llama()
    batch = tiny.batch(rows=8)
    X = {p: site_inputs(model, batch, p) for p in ("model.layers.0.mlp.down_proj",)}
    adapter = plait.attach(model, "eva", rank=3, initializer=Eva(rho=1), data=[batch])
    assert {d.rank for d in adapter.deltas.values()} == {3}
    for path, x in X.items():
        A = adapter.deltas[path].A
        torch.testing.assert_close(A @ A.T, torch.eye(3), rtol=0, atol=1e-5)
        _, S, Vh = torch.linalg.svd(x)
        torch.testing.assert_close((A @ Vh[:3].T).abs().amax(1), torch.ones(3), rtol=1e-2, atol=0)
        kept = (x @ A.T).square().sum()
        torch.testing.assert_close(kept, S[:3].square().sum(), rtol=1e-3, atol=0)
        other = torch.linalg.qr(torch.randn(x.shape[1], 3)).Q
        assert kept > (x @ other).square().sum()


def test_sites_with_the_same_input_get_the_same_a():
    model = tiny.llama()
    adapter = plait.attach(model, "eva", rank=3, initializer=Eva(rho=1), data=[tiny.batch()])
    of = {p.rpartition(".")[2]: d.A for p, d in adapter.deltas.items() if ".layers.0." in p}
    assert torch.equal(of["q_proj"], of["k_proj"]) and torch.equal(of["q_proj"], of["v_proj"])
    assert torch.equal(of["gate_proj"], of["up_proj"])
    assert not torch.equal(of["q_proj"], of["gate_proj"])


def sketch(*shares):
    values = torch.tensor(shares).sqrt()
    return Sketch(torch.eye(len(shares), 8), values, 1.0, 10)


def test_ranks_go_to_the_largest_shares():
    sketches = {"a": sketch(0.9, 0.05), "b": sketch(0.4, 0.3), "c": sketch(0.04, 0.03)}
    assert redistribute(sketches, 3) == {"a": 1, "b": 2, "c": 0}
    assert redistribute(sketches, 6) == {"a": 2, "b": 2, "c": 2}


def test_a_site_that_explains_little_is_left_out_and_scaling_stays():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.few, self.many = nn.Linear(16, 4), nn.Linear(16, 4)

        def forward(self, x, flat):
            return self.few(x) + self.many(flat)

    g = torch.Generator().manual_seed(0)
    line = torch.randn(200, 2, generator=g) @ torch.randn(2, 16, generator=g)
    model = Net()
    adapter = plait.attach(
        model, "eva", rank=1, alpha=6, data=[{"x": line, "flat": torch.randn(200, 16, generator=g)}]
    )
    # Both directions of `few` explain more than any single one of sixteen even ones.
    assert list(adapter.deltas) == ["few"]
    assert adapter.deltas["few"].rank == 2 and adapter.deltas["few"].scaling == 6.0
    assert model(line, line).shape == (200, 4)


def test_the_sum_of_ranks_is_the_budget():
    model = tiny.llama()
    adapter = plait.attach(model, "eva", rank=3, data=[tiny.batch(rows=8)])
    assert sum(d.rank for d in adapter.deltas.values()) <= 3 * 14
    assert max(d.rank for d in adapter.deltas.values()) <= 6
    assert len({d.rank for d in adapter.deltas.values()}) > 1


def test_masked_tokens_do_not_count():
    batch = tiny.batch(rows=4)
    model = tiny.llama()
    x = site_inputs(model, batch, "model.layers.0.self_attn.q_proj").view(4, 12, -1)
    batch["labels"][:, :6] = -100
    adapter = plait.attach(
        model, "eva", rank=2, initializer=Eva(rho=1), targets=["q_proj"], layers=0, data=[batch]
    )
    (delta,) = adapter.deltas.values()
    kept = x[:, 6:].flatten(0, 1)
    best = torch.linalg.svdvals(kept)[:2].square().sum()
    torch.testing.assert_close((kept @ delta.A.T).square().sum(), best, rtol=1e-3, atol=0)


def test_whitening_gives_projections_of_unit_second_moment():
    model, batch = tiny.llama(), tiny.batch(rows=8)
    x = site_inputs(model, batch, "model.layers.0.self_attn.q_proj")
    start = Eva(rho=1, whiten=True)
    adapter = plait.attach(
        model, "eva", rank=2, initializer=start, targets=["q_proj"], layers=0, data=[batch]
    )
    (delta,) = adapter.deltas.values()
    u = x @ delta.A.T
    torch.testing.assert_close(u.T @ u / len(u), torch.eye(2), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_training(method):
    model = tiny.llama()
    adapter = plait.attach(model, method, initializer="eva", rank=4, data=[tiny.batch()], seed=0)
    losses = tiny.losses(model, adapter)
    assert losses[-1] < 0.7 * losses[0]


def test_convolutions_read_patches():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2))
    x = torch.randn(5, 3, 9, 9) * torch.tensor([5.0, 1, 1])[:, None, None]
    adapter = plait.attach(
        model, "eva", rank=4, initializer=Eva(rho=1), targets=["0"], data=[{"input": x}]
    )
    patches = nn.functional.unfold(x, 3, stride=2).transpose(1, 2).flatten(0, 1)
    best = torch.linalg.svdvals(patches)[:4].square().sum()
    got = (patches @ adapter.deltas["0"].A.T).square().sum()
    torch.testing.assert_close(got, best, rtol=1e-2, atol=0)


def test_sound_options_are_asked_for():
    for wrong in ({"rho": 0.5}, {"tau": 0.0}):
        with pytest.raises(plait.PlaitError):
            Eva(**wrong)
