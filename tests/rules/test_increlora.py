"""IncreLoRA: the gated delta, the score, the budget, and growth that disturbs nothing."""

from __future__ import annotations

import pytest
import torch
from rule_models import batches, make_stack, randomise, train

import plait
from plait.adapter import build_adapter, install
from plait.adapter.method import Method
from plait.rules._gated import GatedDelta
from plait.rules._growth import dealt
from plait.rules._orthogonal import orthogonality
from plait.rules.increlora import Increlora


def adapted(**options):
    model = make_stack()
    options = {"rank": 1, "reserve": 2, "alpha": 4, **options}
    return model, plait.attach(model, "increlora", targets=["up", "down"], seed=0, **options)


def rule(**options) -> Increlora:
    return Increlora(**{"target_rank": 3, "top_h": 2, "warmup": 2, "interval": 2, **options})


def ranks(adapter) -> list[int]:
    return [d.rank for d in adapter.deltas.values()]


def total_change(adapter) -> float:
    return float(sum(d.dense().detach().abs().sum() for d in adapter.deltas.values()))


@pytest.mark.parametrize("gate", [1e-5, 0.0])
def test_the_start_is_exactly_zero_and_nothing_is_stuck_there(gate: float) -> None:
    model, adapter = adapted(gate=gate)
    assert total_change(adapter) == 0
    run = plait.RuleStack(model, [rule(warmup=50)], lr=1e-2)
    for delta in adapter.deltas.values():
        delta.grow(2, run.optimizer)
    assert total_change(adapter) == 0
    before = {p: (d.A.detach().clone(), d.B.detach().clone()) for p, d in adapter.deltas.items()}
    train(model, run, batches(3))
    for path, delta in adapter.deltas.items():
        A, B = before[path]
        moved = (delta.A != A).any(1) | (delta.B != B).any(0)
        assert moved[:3].all() and delta.e.all()


def test_the_reserve_trains_in_advance_and_its_gate_does_not() -> None:
    model, adapter = adapted()
    before = {p: d.A[1:].detach().clone() for p, d in adapter.deltas.items()}
    train(model, plait.RuleStack(model, [rule(warmup=50)], lr=1e-3), batches(2))
    for path, delta in adapter.deltas.items():
        assert not torch.equal(delta.A[1:], before[path]) and delta.B[:, 1:].any()
        assert torch.equal(delta.gates()[1:], torch.full((2,), 1e-5, dtype=torch.float64))


def test_the_score_is_that_of_the_materialised_gradient() -> None:
    model, adapter = adapted()
    randomise(adapter)
    ids, *_ = batches(1)
    weights = {path: d.site.base.weight for path, d in adapter.deltas.items()}
    for w in weights.values():
        w.requires_grad_(True)
    gradients = torch.autograd.grad(model(ids), list(weights.values()))
    for w in weights.values():
        w.requires_grad_(False)
    want = {}
    for (path, d), g in zip(adapter.deltas.items(), gradients, strict=True):
        want[path] = float((d.dense() * g).detach().abs().sum()) / (g.shape[0] * g.shape[1]) ** 0.5
    tracker = rule(warmup=50)
    run = plait.RuleStack(model, [tracker], lr=0.0)
    # Two micro-batches of half the loss accumulate to the gradient of the whole.
    for _ in range(2):
        (model(ids) / 2).backward()
    run.step()
    for path, score in want.items():
        mean = 0.15 * score
        expected = mean * 0.15 * abs(score - mean)
        assert tracker.scores()[f"default/{path}"] == pytest.approx(expected, rel=1e-9)


def test_dw_and_its_gradient_are_formed_on_score_steps_only() -> None:
    model, adapter = adapted()
    tracker = rule(warmup=50, score_every=3)
    run = plait.RuleStack(model, [tracker], lr=1e-3)
    hooked = []
    for ids in batches(6):
        hooked.append(len(adapter.deltas["layers.0.up"].site.base._forward_hooks))
        train(model, run, [ids])
    assert hooked == [0, 0, 1, 0, 0, 1]


def test_rank_grows_by_h_times_the_reserve_and_ends_at_the_budget() -> None:
    model, adapter = adapted()
    run = plait.RuleStack(model, [rule()], lr=1e-3)
    totals = []
    for ids in batches(12):
        train(model, run, [ids])
        totals.append(sum(ranks(adapter)))
    # 8 sites: 8 at the start, +2 sites * 2 at steps 2, 4, 6, 8, and the target 24 is met exactly.
    assert totals == [8, 12, 12, 16, 16, 20, 20, 24, 24, 24, 24, 24]
    assert all(d.reserve == 0 for d in adapter.deltas.values())
    assert max(ranks(adapter)) > min(ranks(adapter))
    assert not adapter.deltas["layers.0.up"].site.base._forward_hooks


def test_a_budget_that_growth_does_not_divide_is_still_met_exactly() -> None:
    model, adapter = adapted()
    run = plait.RuleStack(model, [rule(target_rank=2.625, top_h=3)], lr=1e-3)
    train(model, run, batches(12))
    assert sum(ranks(adapter)) == 21


def test_the_highest_scores_grow() -> None:
    model, adapter = adapted()
    tracker = rule(warmup=3, interval=50)
    run = plait.RuleStack(model, [tracker], lr=1e-2)
    train(model, run, batches(3))
    scores = tracker.scores()
    grown = {f"default/{p}" for p, d in adapter.deltas.items() if d.rank > 1}
    assert grown == set(sorted(scores, key=scores.get)[-2:])


def test_growth_leaves_dw_where_it_was() -> None:
    model, adapter = adapted()
    run = plait.RuleStack(model, [rule(warmup=50)], lr=1e-2)
    data = batches(3)
    train(model, run, data)
    before, loss = total_change(adapter), float(model(data[0]).detach())
    scaling = {p: d.scaling for p, d in adapter.deltas.items()}
    for delta in adapter.deltas.values():
        delta.grow(2, run.optimizer)
    assert total_change(adapter) == pytest.approx(before, rel=1e-12)
    assert float(model(data[0]).detach()) == pytest.approx(loss, abs=1e-12)
    assert {p: d.scaling for p, d in adapter.deltas.items()} == scaling
    assert ranks(adapter) == [3] * 8


def test_with_rescale_the_scaling_falls_as_one_over_the_rank() -> None:
    model, adapter = adapted(rescale=True)
    run = plait.RuleStack(model, [rule(warmup=50)], lr=1e-2)
    train(model, run, batches(2))
    delta = adapter.deltas["layers.1.up"]
    before = delta.dense().detach().clone()
    delta.grow(2, run.optimizer)
    assert delta.scaling == pytest.approx(4 / 3)
    torch.testing.assert_close(delta.dense().detach() * 3, before, atol=1e-6, rtol=0)


def test_new_parameters_enter_the_optimiser_once_with_old_moments_untouched() -> None:
    model, adapter = adapted()
    run = plait.RuleStack(model, [rule(warmup=50)], lr=1e-2)
    train(model, run, batches(3))
    delta = adapter.deltas["layers.2.down"]
    old = {k: v.clone() for k, v in run.optimizer.state[delta.A].items()}
    delta.grow(2, run.optimizer)
    listed = [id(p) for g in run.optimizer.param_groups for p in g["params"]]
    assert sorted(listed) == sorted(id(p) for p in adapter.parameters())
    new = run.optimizer.state[delta.A]
    assert torch.equal(new["exp_avg"][:3], old["exp_avg"]) and not new["exp_avg"][3:].any()
    assert torch.equal(new["exp_avg_sq"][:3], old["exp_avg_sq"])
    assert new["step"] == old["step"]
    train(model, run, batches(1))
    assert run.optimizer.state[delta.A]["exp_avg"][3:].any()


def test_the_export_is_a_plain_lora_with_the_rank_of_each_site() -> None:
    model, adapter = adapted()
    run = plait.RuleStack(model, [rule()], lr=1e-2)
    train(model, run, batches(9))
    run.finish()
    lora = adapter.to_lora()
    for path, delta in adapter.deltas.items():
        assert lora.deltas[path].rank == delta.rank
        torch.testing.assert_close(lora.deltas[path].dense(), delta.dense(), atol=1e-12, rtol=1e-10)
        by_hand = delta.scaling * delta.B @ torch.diag(delta.e) @ delta.A
        torch.testing.assert_close(delta.dense(), by_hand, atol=1e-12, rtol=0)


def test_orthogonality_is_the_sum_of_the_norms_one_by_one() -> None:
    matrices = [torch.randn(3, 5), torch.randn(2, 5), torch.randn(3, 5)]
    want = sum((m @ m.T - torch.eye(len(m))).norm() for m in matrices)
    torch.testing.assert_close(orthogonality(matrices), want)


def test_resuming_across_a_growth_gives_the_same_adapter() -> None:
    data = batches(10)
    model, adapter = adapted()
    train(model, plait.RuleStack(model, [rule()], lr=1e-2, seed=0), data)

    first, early = adapted()
    run = plait.RuleStack(first, [rule()], lr=1e-2, seed=0)
    train(first, run, data[:5])
    saved = early.state_dict(), run.optimizer.state_dict(), run.state_dict()
    second = make_stack()
    late = _rebuilt(early, second)
    late.load_state_dict(saved[0])
    run = plait.RuleStack(second, [rule()], lr=1e-2, seed=0)
    run.optimizer.load_state_dict(saved[1])
    run.load_state_dict(saved[2])
    train(second, run, data[5:])
    for key, value in adapter.state_dict().items():
        assert torch.equal(late.state_dict()[key], value), key


def _rebuilt(adapter, model):
    """The adapter of a file: deltas of the shapes that the described options tell."""
    method: Method = plait.get_method("increlora")
    sites = {s.path: s for s in plait.find_sites(model, ["up", "down"])}
    options = {p: method.options(**d.described_options()) for p, d in adapter.deltas.items()}
    made = build_adapter(
        "default",
        method,
        [(sites[p], GatedDelta) for p in adapter.deltas],
        adapter.options,
        by_site=options,
        seed=0,
    )
    return install(model, made)


def test_growth_that_cannot_end_in_time_is_refused() -> None:
    model, _ = adapted()
    late = Increlora(target_rank=9, top_h=1, warmup=2, interval=5)
    with pytest.raises(plait.PlaitError, match="raise top_h"):
        plait.RuleStack(model, [late], total_steps=40)


def test_by_default_growth_is_spread_to_end_in_time() -> None:
    model, adapter = adapted()
    run = plait.RuleStack(model, [Increlora(target_rank=5)], lr=1e-3, total_steps=30)
    data = batches(30)
    train(model, run, data[:22])
    assert sum(ranks(adapter)) == 40
    train(model, run, data[22:])
    assert sum(ranks(adapter)) == 40


def test_growth_needs_a_reserve() -> None:
    model, _ = adapted(reserve=0)
    with pytest.raises(plait.PlaitError, match="no reserve"):
        plait.RuleStack(model, [rule()])
    plait.RuleStack(model, [rule(target_rank=1)])


def test_other_methods_are_refused() -> None:
    model = make_stack()
    plait.attach(model, "lora", rank=2, seed=0)
    with pytest.raises(plait.PlaitError, match="grows the gated"):
        plait.RuleStack(model, [rule()])


@pytest.mark.parametrize("seed", range(20))
def test_growth_goes_down_the_ranking_until_the_budget_is_spent(seed: int) -> None:
    """Against the walk down the sorted sites, with ties, empty reserves and a last part."""
    g = torch.Generator().manual_seed(seed)
    names = [f"s{i}" for i in torch.randperm(7, generator=g).tolist()]
    scores = {n: float(torch.randint(3, (), generator=g)) / 2 for n in names[:5]}
    reserves = {n: int(torch.randint(4, (), generator=g)) for n in names}
    for sites, missing in ((3, 5), (7, 100), (2, 1), (4, 0)):
        want, left = {}, missing
        for name in sorted(names, key=lambda n: (-scores.get(n, 0.0), n))[:sites]:
            extra = min(reserves[name], left)
            left -= extra
            if extra:
                want[name] = extra
        assert dealt(scores, reserves, sites, missing) == want
