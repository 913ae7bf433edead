"""LoRA+: groups, their ratios, and the base optimiser at ratio 1."""

from __future__ import annotations

import pytest
import torch
from rule_models import batches, make_stack, train

import plait
from plait.rules.lora_plus import LoraPlus


def adapted(**options):
    model = make_stack()
    adapter = plait.attach(model, "lora", rank=2, seed=0, **options)
    return model, adapter


def groups_by_name(run: plait.RuleStack) -> dict[str, dict]:
    return {n: g for g in run.optimizer.param_groups for n in g["names"]}


def test_each_parameter_stands_in_one_group_with_its_rate() -> None:
    model, adapter = adapted(targets=["up", "embed"])
    run = plait.RuleStack(model, [LoraPlus(ratio=16, embedding_lr=1e-6)], lr=1e-3, weight_decay=0.1)
    found = [id(p) for g in run.optimizer.param_groups for p in g["params"]]
    assert sorted(found) == sorted(id(p) for p in adapter.parameters())
    by_name = groups_by_name(run)
    assert by_name["default/layers.0.up.A"]["lr"] == pytest.approx(1e-3)
    assert by_name["default/layers.0.up.B"]["lr"] == pytest.approx(16e-3)
    assert by_name["default/embed.A"]["lr"] == by_name["default/embed.B"]["lr"] == 1e-6
    assert by_name["default/layers.0.up.B"]["weight_decay"] == 0.1


def test_vectors_learn_with_b_and_are_not_decayed() -> None:
    model, _ = adapted(bias=True)
    run = plait.RuleStack(model, ["lora-plus"], lr=1e-3, weight_decay=0.1)
    group = groups_by_name(run)["default/layers.1.down.c"]
    assert group["lr"] == pytest.approx(16e-3) and group["weight_decay"] == 0


def test_ratio_one_is_the_base_optimiser() -> None:
    ends = []
    for rules in ([], [LoraPlus(ratio=1, embedding_lr=None)]):
        model, adapter = adapted()
        train(model, plait.RuleStack(model, rules, lr=1e-2), batches(5))
        ends.append(adapter.state_dict())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_a_scheduler_keeps_the_ratio() -> None:
    model, _ = adapted()
    run = plait.RuleStack(model, [LoraPlus(ratio=7)], lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 0.5**step)
    train(model, run, batches(1))
    schedule.step()
    by_name = groups_by_name(run)
    ratio = by_name["default/layers.0.up.B"]["lr"] / by_name["default/layers.0.up.A"]["lr"]
    assert by_name["default/layers.0.up.A"]["lr"] == pytest.approx(5e-4)
    assert ratio == pytest.approx(7)


def test_the_first_update_of_b_is_ratio_times_as_large() -> None:
    moves = []
    for ratio in (1.0, 5.0):
        model, adapter = adapted()
        train(model, plait.RuleStack(model, [LoraPlus(ratio=ratio)], lr=1e-4), batches(1))
        moves.append(adapter.deltas["layers.2.up"].B.detach().clone())
    torch.testing.assert_close(moves[1], 5 * moves[0])


def test_an_adapter_without_pairs_is_refused() -> None:
    model = make_stack()
    plait.attach(model, "increlora", seed=0)
    with pytest.raises(plait.PlaitError, match="pairs"):
        plait.RuleStack(model, ["lora-plus"], total_steps=10)
