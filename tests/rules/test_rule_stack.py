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
    with pytest.raises(plait.PlaitError, match="LoraPro and WithSgd"):
        plait.RuleStack(model, [LoraPro(moments="full"), WithSgd()])


def test_one_rule_s_optimiser_is_taken() -> None:
    model = make_stack()
    plait.attach(model, "lora", rank=2, seed=0)
    run = plait.RuleStack(model, ["lora-plus", WithSgd()])
    assert type(run.optimizer) is torch.optim.SGD
