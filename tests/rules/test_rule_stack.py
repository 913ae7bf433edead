"""Rules in a stack: what may stand together."""

from __future__ import annotations

import pytest
import torch
from rule_models import make_stack

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
