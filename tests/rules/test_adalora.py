"""AdaLoRA: triplets, scores and masks (PEFT's allocator as the oracle), the budget, real ranks."""

from __future__ import annotations

import copy

import pytest
import torch
from rule_models import batches, make_stack, randomise, train

import plait
from plait.adapter import build_adapter, install
from plait.rules._budget import BudgetPlan
from plait.rules._triplets import TripletDelta
from plait.rules.adalora import Adalora

RATE = {"lr": 1e-2}


def adapted(rank: int = 4, **options):
    model = make_stack()
    options = {"rank": rank, "targets": ["up", "down"], "seed": 0, **options}
    return model, plait.attach(model, "adalora", **options)


def stack_of(model, steps: int = 20, **options) -> plait.RuleStack:
    options = {"target_rank": 2, "warmup": 4, "final": 6, **options}
    return plait.RuleStack(model, [Adalora(**options)], total_steps=steps, seed=0, **RATE)


def live(adapter) -> int:
    return sum(int(d.e.count_nonzero()) for d in adapter.deltas.values())


def ranks(adapter) -> list[int]:
    return [d.rank for d in adapter.deltas.values()]


def test_dw_is_p_diag_e_q_and_zero_at_the_start() -> None:
    _, adapter = adapted(alpha=6.0)
    assert not any(d.dense().any() for d in adapter.deltas.values())
    randomise(adapter)
    for delta in adapter.deltas.values():
        want = 6 / 4 * delta.B @ torch.diag(delta.e) @ delta.A
        torch.testing.assert_close(delta.dense(), want)


def test_the_budget_falls_along_the_cubic() -> None:
    plan = BudgetPlan(start=32, target=16, first=4, last=14)
    found = [plan.at(t) for t in range(1, 21)]
    by_hand = [int(16 + 16 * (1 - (t - 4) / 10) ** 3) for t in range(5, 14)]
    assert found == [32] * 4 + by_hand + [16] * 7
    assert by_hand[0] == 27 and by_hand[4] == 18  # 16 + 16 * .729, 16 + 16 * .125
    assert found == sorted(found, reverse=True)


def peft_model(adapter, **config):
    """PEFT's AdaLoRA over the same base, holding the same tensors as `adapter`."""
    peft = pytest.importorskip("peft")
    settings = {"init_r": 4, "target_r": 2, "lora_alpha": 8, "total_step": 20, **config}
    config = peft.AdaLoraConfig(target_modules=["up", "down"], **settings)
    theirs = peft.get_peft_model(make_stack(), config)
    modules = dict(theirs.base_model.model.named_modules())
    with torch.no_grad():
        for path, delta in adapter.deltas.items():
            modules[path].lora_A["default"].data = delta.A.detach().clone()
            modules[path].lora_B["default"].data = delta.B.detach().clone()
            modules[path].lora_E["default"].data = delta.e.detach().clone()[:, None]
    return theirs, modules


def test_scores_and_masks_are_peft_s() -> None:
    model, adapter = adapted(alpha=8 * 4 / (4 + 1e-5))  # PEFT divides by init_r + 1e-5
    randomise(adapter)
    theirs, modules = peft_model(adapter)
    run = stack_of(model, orthogonal=0.0)
    allocator = theirs.base_model.rankallocator
    # Its rank numbers require gradients too, and must not train.
    trained = [p for n, p in theirs.named_parameters() if ".lora_" in n]
    optimizer = torch.optim.AdamW(trained, 1e-2)
    for group in (*run.optimizer.param_groups, *optimizer.param_groups):
        group["weight_decay"] = 0.0
    for step, ids in enumerate(batches(13), 1):
        train(model, run, [ids])
        loss = theirs.base_model.model(ids)
        optimizer.zero_grad()
        loss.backward()
        allocator.update_ipt(theirs.base_model.model)
        optimizer.step()
        if step > 4:
            budget = run.rules[0].budget
            assert budget == allocator_budget(step)
            allocator.mask_to_budget(theirs.base_model.model, budget)
        for path, delta in adapter.deltas.items():
            other = modules[path].lora_E["default"][:, 0]
            assert torch.equal(delta.e == 0, other == 0), (step, path)
            torch.testing.assert_close(delta.e, other, rtol=1e-7, atol=1e-10)


def allocator_budget(step: int) -> int:
    from peft.tuners.adalora.layer import RankAllocator

    made = object.__new__(RankAllocator)
    made.init_bgt, made.target_bgt = 32, 16
    made.peft_config = type("Config", (), {"tinit": 4, "tfinal": 6, "total_step": 20, "deltaT": 1})
    return made.budget_schedule(step)[0]


def test_first_scores_in_closed_form() -> None:
    model, adapter = adapted()
    randomise(adapter)
    run = stack_of(model, beta1=0.8, beta2=0.7, orthogonal=0.0)
    (ids,) = batches(1)
    model(ids).backward()
    delta = adapter.deltas["layers.1.up"]
    want = torch.zeros(4, dtype=torch.float64)
    for p, dims in ((delta.e, None), (delta.A, 1), (delta.B, 0)):
        impact = (p * p.grad).abs().detach()
        score = 0.2 * impact * 0.3 * (impact - 0.2 * impact)
        want += score if dims is None else score.mean(dims)
    run.before_step()
    scores = run.rules[0]._triplets.scores.along("default/layers.1.up", delta.rank_axes())
    torch.testing.assert_close(scores, want)


@pytest.mark.parametrize("shrink", ["final", "always", "end"])
def test_the_target_is_met_exactly_and_ranks_really_shrink(shrink: str) -> None:
    model, adapter = adapted()
    run = stack_of(model, shrink=shrink)
    left, widths = [], []
    for ids in batches(20):
        train(model, run, [ids])
        left.append(live(adapter))
        widths.append(sum(ranks(adapter)))
    budget = BudgetPlan(32, 16, 4, 14)
    assert left == [budget.at(t) for t in range(1, 21)]
    assert widths == {"final": [32] * 13 + [16] * 7, "always": left, "end": [32] * 20}[shrink]
    run.finish()
    assert sum(ranks(adapter)) == live(adapter) == 16
    assert max(ranks(adapter)) > min(ranks(adapter))
    listed = [id(p) for g in run.optimizer.param_groups for p in g["params"]]
    assert sorted(listed) == sorted(id(p) for p in adapter.parameters())


def test_the_highest_scores_stay() -> None:
    model, _ = adapted()
    run = stack_of(model)
    train(model, run, batches(13))
    pruner = run.rules[0]._triplets
    scores = {n: pruner.scores.along(n, d.rank_axes()) for n, d in pruner.deltas.items()}
    chosen = pruner.choose(10)
    kept = torch.cat([scores[n][c] for n, c in chosen.items()])
    gone = torch.cat([scores[n][~c] for n, c in chosen.items()])
    assert len(kept) == 10 and kept.min() >= gone.max() > 0


def test_a_masked_triplet_may_come_back_until_the_pattern_is_final() -> None:
    model, adapter = adapted()
    run = stack_of(model, interval=2)
    data = batches(20)
    train(model, run, data[:6])
    gone = {p: d.e == 0 for p, d in adapter.deltas.items()}
    assert any(g.any() for g in gone.values())
    train(model, run, data[6:7])  # between two prunings
    assert all(d.e[gone[p]].all() for p, d in adapter.deltas.items())
    train(model, run, data[7:])
    assert live(adapter) == sum(ranks(adapter)) == 16


def test_dropping_changes_neither_the_model_nor_the_moments_of_what_stays() -> None:
    model, adapter = adapted()
    run = stack_of(model, shrink="end")
    data = batches(14)
    train(model, run, data)
    rule = run.rules[0]
    before = float(model(data[0]).detach())
    name, delta = "layers.2.down", adapter.deltas["layers.2.down"]
    best = rule._pattern[f"default/{name}"]
    moments = run.optimizer.state[delta.A]["exp_avg"][best].clone()
    scaling = delta.scaling
    rule.finish()
    assert float(model(data[0]).detach()) == pytest.approx(before, abs=1e-12)
    assert delta.rank == int(best.sum()) and delta.scaling == pytest.approx(scaling, rel=1e-12)
    assert torch.equal(run.optimizer.state[delta.A]["exp_avg"], moments)


def test_the_final_phase_trains_as_if_masked() -> None:
    """Without the regulariser, which counts dropped triplets too, dropping is only cheaper."""
    data, found = batches(20), {}
    for shrink in ("final", "end"):
        model, adapter = adapted()
        run = stack_of(model, shrink=shrink, orthogonal=0.0)
        train(model, run, data)
        found[shrink] = {p: d.dense().detach() for p, d in adapter.deltas.items()}
    for path, dense in found["final"].items():
        torch.testing.assert_close(dense, found["end"][path], rtol=1e-9, atol=1e-12)


def test_a_site_that_loses_every_triplet_is_the_base_again() -> None:
    model, adapter = adapted()
    run = stack_of(model, target_rank=0.5)
    train(model, run, batches(20))
    run.finish()
    assert 0 in ranks(adapter) and sum(ranks(adapter)) == 4
    x = torch.randn(3, 6, dtype=torch.float64)
    path = next(p for p, d in adapter.deltas.items() if d.rank == 0)
    module = model.get_submodule(path)
    x = torch.randn(3, module.in_features, dtype=torch.float64)
    assert torch.equal(module(x), torch.nn.functional.linear(x, module.weight, module.bias))


def test_the_regulariser_is_the_mean_distance_from_orthonormal() -> None:
    model, adapter = adapted()
    randomise(adapter)
    run = stack_of(model, orthogonal=0.5)
    eye = torch.eye(4, dtype=torch.float64)
    norms = [(d.A @ d.A.T - eye).norm() for d in adapter.deltas.values()]
    norms += [(d.B.T @ d.B - eye).norm() for d in adapter.deltas.values()]
    torch.testing.assert_close(run.extra_loss(), 0.5 * torch.stack(norms).mean())
    quiet = plait.RuleStack(model, [Adalora(orthogonal=0.0)], total_steps=20, **RATE)
    assert not isinstance(quiet.extra_loss(), torch.Tensor)


@pytest.mark.parametrize(("shrink", "cut"), [("final", 8), ("always", 8), ("end", 16)])
def test_resuming_gives_the_same_adapter(shrink: str, cut: int) -> None:
    data = batches(20)
    model, adapter = adapted()
    train(model, stack_of(model, shrink=shrink), data)

    first, early = adapted()
    run = stack_of(first, shrink=shrink)
    train(first, run, data[:cut])
    saved = copy.deepcopy((early.state_dict(), run.optimizer.state_dict(), run.state_dict()))
    second = make_stack()
    late = _rebuilt(early, second)
    late.load_state_dict(saved[0])
    run = stack_of(second, shrink=shrink)
    run.optimizer.load_state_dict(saved[1])
    run.load_state_dict(saved[2])
    train(second, run, data[cut:])
    for key, value in adapter.state_dict().items():
        assert torch.equal(late.state_dict()[key], value), key


def _rebuilt(adapter, model):
    method = plait.get_method("adalora")
    sites = {s.path: s for s in plait.find_sites(model, ["up", "down"])}
    options = {p: method.options(**d.described_options()) for p, d in adapter.deltas.items()}
    pieces = [(sites[p], TripletDelta) for p in adapter.deltas]
    made = build_adapter("default", method, pieces, adapter.options, by_site=options, seed=0)
    return install(model, made)


def test_uneven_ranks_survive_a_file_and_an_export(tmp_path) -> None:
    model, adapter = adapted()
    run = stack_of(model, target_rank=0.5)
    train(model, run, batches(20))
    run.finish()
    adapter.save(tmp_path / "a")
    again = plait.load(make_stack(), tmp_path / "a")
    low = adapter.to_lora()
    for path, delta in adapter.deltas.items():
        assert again.deltas[path].rank == delta.rank == low.deltas[path].rank
        assert torch.equal(again.deltas[path].dense(), delta.dense())
        torch.testing.assert_close(low.deltas[path].dense(), delta.dense())


def test_a_run_that_is_cut_short_keeps_the_budget_it_had() -> None:
    model, adapter = adapted()
    run = stack_of(model)
    train(model, run, batches(8))
    run.finish()
    assert sum(ranks(adapter)) == live(adapter) == BudgetPlan(32, 16, 4, 14).at(8)


def test_new_triplets_do_not_move_dw_and_can_learn() -> None:
    model, adapter = adapted()
    run = stack_of(model)
    train(model, run, batches(2))
    delta = adapter.deltas["layers.0.up"]
    before = delta.dense().detach()
    delta.grow(2, run.optimizer)
    torch.testing.assert_close(delta.dense().detach(), before)
    model(batches(1)[0]).backward()
    assert delta.e.grad[4:].all()


@pytest.mark.parametrize(
    ("options", "steps", "message"),
    [
        ({}, None, "needs total_steps"),
        ({"target_rank": 9}, 20, "average rank at the start, 4"),
        ({"target_rank": 0}, 20, "above 0"),
        ({"warmup": 15, "final": 10}, 20, "lower warmup or final"),
    ],
)
def test_schedules_that_cannot_be_are_refused(options, steps, message) -> None:
    model, _ = adapted()
    with pytest.raises(plait.PlaitError, match=message):
        plait.RuleStack(model, [Adalora(**options)], total_steps=steps)


def test_other_methods_are_refused() -> None:
    model = make_stack()
    plait.attach(model, "lora", rank=2, seed=0)
    with pytest.raises(plait.PlaitError, match="drops the triplets"):
        plait.RuleStack(model, ["adalora"], total_steps=10)
