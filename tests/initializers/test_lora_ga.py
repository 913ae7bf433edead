"""LoRA-GA: directions, scales, and the first step against the SVD of the full gradient."""

import pytest
import torch
from torch import nn

import plait
import tiny
from plait.initializers.lora_ga import LoraGA
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


def net(rank=3, alpha=5.0, method="lora", **options):
    torch.manual_seed(1)
    model = Net().double()
    G = gradient_pass(model, plait.find_sites(model, ["lin"]), data())["lin"].double()
    start = LoraGA(niter=12, **options)
    adapter = plait.attach(
        model, method, initializer=start, data=data(), rank=rank, alpha=alpha, seed=2
    )
    return model, adapter.deltas["lin"], adapter, G


def test_the_model_starts_at_the_base_and_the_base_is_untouched():
    model = tiny.llama()
    before, weights = tiny.logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    plait.attach(model, "lora-ga", rank=4, data=[tiny.batch()])
    torch.testing.assert_close(tiny.logits(model), before, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
def test_factors_are_disjoint_singular_directions_of_the_gradient(direction):
    _, delta, _, G = net(direction=direction, scale="unit")
    U, S, Vh = torch.linalg.svd(G)
    on_a, on_b = (delta.A @ Vh.T).abs(), (U.T @ delta.B).abs()
    a, b = on_a.argmax(1), on_b.argmax(0)
    torch.testing.assert_close(on_a.amax(1), torch.ones(3).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(on_b.amax(0), torch.ones(3).double(), rtol=1e-4, atol=0)
    assert sorted([*a.tolist(), *b.tolist()]) == list(range(6))
    known = {
        "ArB2r": ([0, 1, 2], [3, 4, 5]),
        "A2rBr": ([3, 4, 5], [0, 1, 2]),
        "ArBr": ([1, 3, 5], [0, 2, 4]),
    }
    if direction in known:
        assert (a.tolist(), b.tolist()) == known[direction]
    assert (delta.B.T @ G @ delta.A.T).abs().max() < 1e-6 * S[0]


@pytest.mark.parametrize("scale", ["stable", "gd", "unit", "weight"])
def test_rows_of_a_and_columns_of_b_are_orthogonal_with_the_stated_length(scale):
    model, delta, _, _ = net(scale=scale, gamma=9.0)
    S = torch.linalg.svdvals(model.lin.weight.detach())
    size = {
        "stable": 12**0.25 / 3,
        "gd": 1 / delta.scaling,
        "unit": 1.0,
        "weight": float((S[:3] / delta.scaling).sqrt().mean()),
    }[scale]
    eye = size**2 * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(delta.A @ delta.A.T, eye, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(delta.B.T @ delta.B, eye, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", ["stable", "gd"])
def test_the_first_step_is_the_best_rank_2r_approximation_of_the_gradient(scale):
    model, delta, _, G = net(scale=scale)
    model(**data()[0]).loss.backward()
    s, z = delta.scaling, float(delta.A[0].detach().norm())
    step = s * (delta.B.grad @ delta.A + delta.B @ delta.A.grad)
    U, S, Vh = torch.linalg.svd(G)
    best = (U[:, :6] * S[:6]) @ Vh[:6]
    torch.testing.assert_close(step, s**2 * z**2 * best, rtol=1e-4, atol=1e-6)


def test_with_gd_the_first_step_does_not_depend_on_alpha():
    steps = []
    for alpha in (1.0, 7.0):
        model, delta, _, _ = net(scale="gd", alpha=alpha)
        model(**data()[0]).loss.backward()
        steps.append(delta.scaling * (delta.B.grad @ delta.A + delta.B @ delta.A.grad))
    torch.testing.assert_close(*steps)


def test_micro_batches_give_the_same_start():
    whole = tiny.batch(rows=4)
    parts = [{k: v[i : i + 1] for k, v in whole.items()} for i in range(4)]
    starts = []
    for batches in ([whole], parts):
        model = tiny.llama()
        adapter = plait.attach(model, "lora-ga", rank=1, targets=["o_proj"], data=batches, seed=0)
        starts.append(next(iter(adapter.deltas.values())).trained().dense())
    torch.testing.assert_close(*starts, rtol=1e-3, atol=1e-4)


def test_the_export_on_the_original_model_reproduces_the_outputs():
    model = tiny.llama()
    adapter = plait.attach(model, "lora-ga", rank=2, data=[tiny.batch()], seed=0)
    tiny.losses(model, adapter, steps=3)
    want, low = tiny.logits(model), adapter.to_lora()
    assert {d.rank for d in low.deltas.values()} == {4}
    plait.detach(model)
    with torch.no_grad():
        for path, delta in low.deltas.items():
            model.get_submodule(path).weight += delta.dense()
    torch.testing.assert_close(tiny.logits(model), want, rtol=1e-4, atol=1e-4)


def test_a_rank_above_half_the_shorter_side_is_lowered_with_its_scaling_kept():
    model = tiny.llama()
    adapter = plait.attach(model, "lora-ga", rank=12, alpha=24, data=[tiny.batch()])
    ranks = {p.rpartition(".")[2]: d.rank for p, d in adapter.deltas.items()}
    assert ranks["q_proj"] == 12 and ranks["k_proj"] == 8
    assert {d.scaling for d in adapter.deltas.values()} == {2.0}


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_training(method):
    model = tiny.llama()
    adapter = plait.attach(
        model, method, initializer=LoraGA(gamma=64), rank=4, data=[tiny.batch(rows=8)], seed=0
    )
    losses = tiny.losses(model, adapter)
    assert losses[-1] < 0.7 * losses[0]


def test_data_and_sound_options_are_asked_for():
    with pytest.raises(plait.PlaitError, match="data="):
        plait.attach(tiny.llama(), "lora-ga")
    for wrong in ({"direction": "ABr"}, {"scale": "big"}, {"gamma": 0.0}):
        with pytest.raises(plait.PlaitError):
            LoraGA(**wrong)
