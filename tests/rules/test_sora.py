"""SoRA: the proximal step, the gates' own group and schedule, and components that really go."""

from __future__ import annotations

import copy

import pytest
import torch
from rule_models import batches, make_stack, randomise, train
from torch import nn

import plait
from plait.rules._sparse_gate import shrunk
from plait.rules.sora import Sora


def adapted(rank: int = 4, **options):
    model = make_stack()
    options = {"rank": rank, "targets": ["up", "down"], "seed": 0, **options}
    return model, plait.attach(model, "sora", **options)


def stack_of(model, steps: int = 12, lr: float = 1e-2, decay: float = 0.0, **options):
    rule = Sora(**{"warmup": 0, **options})
    return plait.RuleStack(model, [rule], lr=lr, weight_decay=decay, total_steps=steps, seed=0)


def open_gates(adapter) -> int:
    return sum(int(d.g.count_nonzero()) for d in adapter.deltas.values())


def test_dw_is_b_diag_g_a_and_zero_at_the_start() -> None:
    _, adapter = adapted(alpha=6.0)
    for delta in adapter.deltas.values():
        assert not delta.dense().any() and delta.g.all()
    randomise(adapter)
    for delta in adapter.deltas.values():
        torch.testing.assert_close(delta.dense(), 6 / 4 * delta.B @ delta.g.diag() @ delta.A)


def test_the_step_is_the_argmin_of_the_proximal_problem() -> None:
    grid = torch.linspace(-4, 4, 800_001, dtype=torch.float64)
    for tau in (0.0, 0.3, 1.1):
        for u in (-2.5, -1.1, -0.2, 0.0, 0.31, 1.7):
            best = grid[(0.5 * (grid - u).square() + tau * grid.abs()).argmin()]
            found = shrunk(torch.tensor(u, dtype=torch.float64), tau)
            assert float(found) == pytest.approx(float(best), abs=1e-5), (tau, u)


def test_the_step_is_firmly_non_expansive() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 4000, generator=g, dtype=torch.float64)
    tau = torch.rand(4000, generator=g, dtype=torch.float64)
    moved = shrunk(x, tau) - shrunk(y, tau)
    assert (moved.square() <= moved * (x - y) + 1e-12).all()


def test_the_legacy_step_is_three_masks_in_a_row() -> None:
    tau = 0.25  # exact in binary, so that the edges are met
    u = torch.arange(-8, 9) / 8 * 0.75
    u = torch.cat([u, torch.tensor([0.5, -0.5, 0.49, 0.26])])
    want = u.clone()
    want[want > tau] -= tau
    want[want < -tau] += tau
    want[want.abs() < tau] = 0.0
    assert torch.equal(shrunk(u, tau, legacy=True), want)
    assert torch.equal(shrunk(u, 0.0, legacy=True), u)
    assert not torch.equal(shrunk(u, tau), want)


class DiagonalLora(nn.Module):
    """W x + scaling B diag(g) A x, written out."""

    def __init__(self, base: nn.Linear, delta) -> None:
        super().__init__()
        self.base, self.scaling = base, delta.scaling
        self.A, self.B, self.g = (nn.Parameter(t.detach().clone()) for t in delta.parameters())

    def forward(self, x):
        return self.base(x) + self.scaling * (x @ self.A.T * self.g) @ self.B.T


def test_without_a_threshold_it_is_lora_with_a_trainable_diagonal() -> None:
    model, adapter = adapted()
    assert [n for n, _ in adapter.deltas["layers.0.up"].named_parameters()] == ["A", "B", "g"]
    other = make_stack()
    for layer, path in ((layer, f"layers.{i}") for i, layer in enumerate(other.layers)):
        layer.requires_grad_(False)
        layer.up = DiagonalLora(layer.up, adapter.deltas[f"{path}.up"])
        layer.down = DiagonalLora(layer.down, adapter.deltas[f"{path}.down"])
    trained = [p for m in other.modules() if isinstance(m, DiagonalLora) for p in (m.A, m.B, m.g)]
    optimizer = torch.optim.AdamW(trained, 1e-2, weight_decay=0.0)
    data = batches(5)
    losses = train(model, stack_of(model, lambdas=[0.0]), data)
    for ids, loss in zip(data, losses, strict=True):
        theirs = other(ids)
        assert float(theirs.detach()) == pytest.approx(loss, rel=1e-12)
        optimizer.zero_grad()
        theirs.backward()
        optimizer.step()


@pytest.mark.parametrize("scale", ["rate", "adam", "none"])
def test_the_threshold_follows_the_optimiser_s_step(scale: str) -> None:
    """The gates after a step are the proximal step of those that AdamW alone leaves."""
    (ids,) = batches(1)
    model, adapter = adapted()
    randomise(adapter)
    lr, strength = 3e-2, {"rate": 5.0, "adam": 0.01, "none": 0.1}[scale]
    plain_model, plain = adapted()
    randomise(plain)
    plain_run = stack_of(plain_model, lr=lr, lambdas=[0.0])
    train(plain_model, plain_run, [ids])
    train(model, stack_of(model, lr=lr, lambdas=[strength], scale=scale), [ids])
    closed = 0
    for path, delta in adapter.deltas.items():
        u = plain.deltas[path].g.detach()
        state = plain_run.optimizer.state[plain.deltas[path].g]
        second = (state["exp_avg_sq"] / (1 - 0.999)).sqrt() + 1e-8
        size = {"rate": lr, "adam": lr / second, "none": 1.0}[scale]
        want = u.sign() * (u.abs() - strength * size).clamp_min(0)
        torch.testing.assert_close(delta.g.detach(), want, rtol=1e-9, atol=1e-12)
        closed += int((delta.g == 0).sum())
    assert closed > 0


def test_a_smaller_rate_from_the_scheduler_means_a_smaller_threshold() -> None:
    model, adapter = adapted()
    run = stack_of(model, lambdas=[3.0])
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    before = {p: d.g.detach().clone() for p, d in adapter.deltas.items()}
    train(model, run, batches(2))
    assert all(torch.equal(d.g, before[p]) for p, d in adapter.deltas.items())


def test_decay_and_the_other_groups_leave_the_gates_alone() -> None:
    model, adapter = adapted()
    run = stack_of(model, decay=0.3)
    gates = {id(d.g) for d in adapter.deltas.values()}
    for group in run.optimizer.param_groups:
        own = [id(p) in gates for p in group["params"]]
        assert all(own) or not any(own)
        assert group["weight_decay"] == (0.0 if own[0] else 0.3)
    assert len(run.optimizer.param_groups) == 2


def test_the_loss_term_is_the_mean_size_of_a_gate() -> None:
    model, adapter = adapted(overrides={"layers.1.up": {"rank": 2}})
    run = stack_of(model, l1=10.0)
    every = torch.cat([d.g for d in adapter.deltas.values()])
    assert len(every) == 30
    torch.testing.assert_close(run.extra_loss(), 10.0 * every.abs().mean())
    assert not isinstance(stack_of(model).extra_loss(), torch.Tensor)


def test_a_closed_gate_comes_back_when_its_gradient_is_large_enough() -> None:
    model, adapter = adapted()
    randomise(adapter)
    delta = adapter.deltas["layers.1.up"]
    with torch.no_grad():
        delta.g[2] = 0.0
    # Adam's first step is the rate, whatever the gradient: below 1 lambda cannot hold a gate shut.
    run = stack_of(model, lambdas=[0.5])
    train(model, run, batches(1))
    assert float(delta.g[2].detach().abs()) == pytest.approx(0.5e-2, rel=1e-3)
    with torch.no_grad():
        delta.g[2] = 0.0
    run.rules[0].lambdas = [50.0]
    train(model, run, batches(1))
    assert delta.g[2] == 0


def test_a_higher_lambda_leaves_fewer_gates_at_fixed_factors() -> None:
    counts = []
    for strength in (0.0, 20.0, 60.0, 150.0):
        model, adapter = adapted(rank=8)
        for delta in adapter.deltas.values():
            delta.A.requires_grad_(False)
            delta.B.requires_grad_(False)
        train(model, stack_of(model, lambdas=[strength]), batches(1))
        counts.append(open_gates(adapter))
    assert counts == sorted(counts, reverse=True) and counts[0] == 64 > counts[1] > counts[-1]


def test_lambda_warms_up_and_climbs_the_schedule() -> None:
    model, _ = adapted()
    rule = stack_of(model, steps=12, lambdas=[1.0, 2.0, 4.0], warmup=2).rules[0]
    assert [rule.strength(t) for t in range(1, 13)] == [0.5] + [1.0] * 3 + [2.0] * 4 + [4.0] * 4


def test_every_stage_leaves_a_record_of_its_ranks() -> None:
    model, adapter = adapted()
    run = stack_of(model, steps=9, lambdas=[5.0, 20.0, 60.0])
    counts = []
    for ids in batches(9):
        train(model, run, [ids])
        counts.append(open_gates(adapter))
    history = run.rules[0].history
    assert [h["step"] for h in history] == [3, 6, 9]
    assert [h["lambda"] for h in history] == [5.0, 20.0, 60.0]
    assert [sum(h["ranks"].values()) for h in history] == [counts[2], counts[5], counts[8]]
    assert run.rules[0].ranks() == history[-1]["ranks"]
    assert 0 < counts[8] < counts[2] <= 32
    run.finish()
    assert adapter.info["sora"] == history


def test_what_is_closed_goes_and_the_model_stays(tmp_path) -> None:
    model, adapter = adapted(overrides={"layers.2.down": {"alpha": 3.0}})
    run = stack_of(model, lambdas=[25.0])
    data = batches(8)
    train(model, run, data)
    with torch.no_grad():
        adapter.deltas["layers.0.up"].g.zero_()  # a site that loses everything
        before = model(data[0])
    kept = {p: (d.g != 0).clone() for p, d in adapter.deltas.items()}
    moments = {p: run.optimizer.state[d.A]["exp_avg"][kept[p]] for p, d in adapter.deltas.items()}
    run.finish()
    torch.testing.assert_close(model(data[0]), before, rtol=1e-12, atol=1e-12)
    ranks = {p: d.rank for p, d in adapter.deltas.items()}
    assert ranks == {p: int(k.sum()) for p, k in kept.items()} and ranks["layers.0.up"] == 0
    assert 0 < sum(ranks.values()) < 32
    for path, delta in adapter.deltas.items():
        assert torch.equal(run.optimizer.state[delta.A]["exp_avg"], moments[path])
        assert delta.g.all()
    listed = [id(p) for g in run.optimizer.param_groups for p in g["params"]]
    assert sorted(listed) == sorted(id(p) for p in adapter.parameters())
    low = adapter.to_lora()
    assert low.num_parameters() == sum(
        r * sum(adapter.deltas[p].site.shape) for p, r in ranks.items()
    )
    adapter.save(tmp_path / "a")
    again = plait.load(make_stack(), tmp_path / "a")
    for path, delta in adapter.deltas.items():
        torch.testing.assert_close(low.deltas[path].dense(), delta.dense())
        assert torch.equal(again.deltas[path].dense(), delta.dense())


def test_a_final_budget_keeps_the_components_of_greatest_norm() -> None:
    model, adapter = adapted()
    run = stack_of(model, lambdas=[0.0], target_rank=1.5)
    train(model, run, batches(4))
    sizes = {}
    for path, d in adapter.deltas.items():
        parts = [d.scaling * d.g[k] * torch.outer(d.B[:, k], d.A[k]) for k in range(4)]
        sizes[path] = torch.stack([p.norm() for p in parts]).detach()
    floor = torch.cat(list(sizes.values())).sort(descending=True).values[11]
    run.finish()
    assert {p: d.rank for p, d in adapter.deltas.items()} == {
        p: int((s >= floor).sum()) for p, s in sizes.items()
    }


def test_a_component_grown_behind_a_gate_can_learn() -> None:
    model, adapter = adapted()
    randomise(adapter)
    delta = adapter.deltas["layers.0.up"]
    before = delta.dense().detach()
    delta.grow(2)
    assert torch.equal(delta.dense().detach(), before) and delta.rank == 6
    model(batches(1)[0]).backward()
    assert delta.B.grad[:, 4:].abs().sum() > 0


def test_the_record_survives_a_checkpoint() -> None:
    model, _ = adapted()
    run = stack_of(model, steps=4, lambdas=[1.0, 2.0])
    train(model, run, batches(2))
    saved = copy.deepcopy(run.state_dict())
    again = stack_of(model, steps=4, lambdas=[1.0, 2.0])
    again.load_state_dict(saved)
    assert again.rules[0].history == run.rules[0].history and len(again.rules[0].history) == 1


@pytest.mark.parametrize(
    ("options", "steps", "message"),
    [
        ({"lambdas": []}, 9, "one or more numbers"),
        ({"lambdas": [-1.0]}, 9, "at least 0"),
        ({"threshold": "hard"}, 9, "use one of soft, legacy"),
        ({"target_rank": 0}, 9, "above 0"),
        ({"warmup": 0.1}, None, "needs total_steps"),
        ({"lambdas": [1, 2]}, 1, "2 lambdas need as many"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, steps, message) -> None:
    model, _ = adapted()
    with pytest.raises(plait.PlaitError, match=message):
        plait.RuleStack(model, [Sora(**{"warmup": 0, **options})], total_steps=steps)


def test_other_methods_are_refused() -> None:
    model = make_stack()
    plait.attach(model, "lora", rank=2, seed=0)
    with pytest.raises(plait.PlaitError, match="attach method sora"):
        plait.RuleStack(model, ["sora"], total_steps=10)
