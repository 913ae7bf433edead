"""Rules in a stack: what may stand together."""

from __future__ import annotations

import pytest
import torch
from rule_models import batches, make_stack, train

import plait
from plait.rules.lora_pro import LoraPro


class WithSgd(plait.Rule):
    def optimizer(self):
        return torch.optim.SGD


def test_two_rules_that_bring_an_optimiser_are_refused() -> None:
    model = make_stack()
    plait.attach(model, "lora", rank=2, seed=0)
    with pytest.raises(plait.PlaitError, match="LoraPro and WithSgd each bring an optimiser"):
        plait.RuleStack(model, [LoraPro(moments="full"), WithSgd()])


def test_one_rule_s_optimiser_is_taken() -> None:
    model = make_stack()
    plait.attach(model, "lora", rank=2, seed=0)
    run = plait.RuleStack(model, ["lora-plus", WithSgd()])
    assert type(run.optimizer) is torch.optim.SGD


class Frees(plait.Rule):
    claims = frozenset({"ranks"})


class Remembers(plait.Rule):
    keeps_shapes = True


def test_rules_with_one_claim_or_with_clashing_states_are_refused_by_their_declarations() -> None:
    model = make_stack()
    plait.attach(model, "lora", rank=2, seed=0)
    plait.RuleStack(model, [Frees(), "lora-plus"])
    with pytest.raises(plait.PlaitError, match="Frees and Frees each change ranks"):
        plait.RuleStack(model, [Frees(), Frees()])
    with pytest.raises(plait.PlaitError, match=r"Remembers keeps a state .* rule Frees"):
        plait.RuleStack(model, [Frees(), Remembers()])
    with pytest.raises(plait.PlaitError, match="LoraPro and LoraFa each replace"):
        plait.RuleStack(model, ["lora-pro", "lora-fa"])


@pytest.mark.parametrize("rule", ["lora-pro", "lora-fa", "riemannian", "lora-plus", "allora"])
def test_a_head_that_trains_along_needs_no_pairs(rule: str) -> None:
    model = make_stack()
    plait.attach(model, "lora", rank=2, seed=0, targets=["up"], train_modules=["head"])
    run = plait.RuleStack(model, [rule], lr=1e-2)
    before = [p.detach().clone() for g in run.optimizer.param_groups for p in g["params"]]
    train(model, run, batches(2))
    after = [p for g in run.optimizer.param_groups for p in g["params"]]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_adalora_trains_beside_a_head() -> None:
    model = make_stack()
    plait.attach(model, "adalora", rank=3, seed=0, targets=["up"], train_modules=["head"])
    run = plait.RuleStack(model, [{"adalora": {"warmup": 0, "final": 1}}], total_steps=4)
    train(model, run, batches(4))
    run.finish()
