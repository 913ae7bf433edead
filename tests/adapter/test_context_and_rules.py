"""What routing needs beside x travels in a context; rules stack over one optimiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import plait
from plait import PlaitError
from plait.adapter import Delta, Method, Traits, make_group, make_rule, split_group
from plait.testing import make_model, perturb


class TaskScaled(Delta):
    """Scales the output by a learned number per task; leaves a load loss behind."""

    traits = Traits(reads_output=True, linear_in_x=False)

    def build(self) -> None:
        self.parameter("scale", 3)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        assert y is not None
        scale = self.get_parameter("scale")[self.context.get("task", 0)]
        self.context.record(self.site.path, scale=scale)
        return scale * y

    @classmethod
    def auxiliary_loss(cls, deltas: Any, context: Any) -> Tensor | None:
        found = [
            context.records[d.site.path]["scale"] for d in deltas if d.site.path in context.records
        ]
        return torch.stack(found).square().sum() if found else None


TASKS = Method("task-scaled-for-tests", "Tasks", "none", "routing", delta=TaskScaled)


@pytest.fixture
def model() -> nn.Module:
    model = make_model("linear")
    perturb(plait.attach(model, TASKS, seed=1))
    return model


def x() -> Tensor:
    return torch.randn(4, 12, generator=torch.Generator().manual_seed(3))


# -- context ---------------------------------------------------------------------------------------


def test_values_hold_within_the_block_and_nest(model: nn.Module) -> None:
    plain = model(x()).logits
    with plait.routing(model, task=2):
        second = model(x()).logits
        with plait.routing(model, task=1):
            first = model(x()).logits
        assert torch.equal(model(x()).logits, second)
    assert torch.equal(model(x()).logits, plain)
    assert not torch.equal(first, second) and not torch.equal(first, plain)


def test_values_are_put_back_after_an_error(model: nn.Module) -> None:
    plain = model(x()).logits
    with pytest.raises(RuntimeError, match="on purpose"), plait.routing(model, task=2):
        raise RuntimeError("on purpose")
    assert torch.equal(model(x()).logits, plain)


def test_the_auxiliary_loss_sums_what_active_adapters_recorded(model: nn.Module) -> None:
    adapter = plait.adapters(model)["default"]
    with plait.routing(model, task=1):
        model(x())
    wanted = sum(float(d.scale[1].detach()) ** 2 for d in adapter.deltas.values())
    loss = plait.auxiliary_loss(model)
    assert isinstance(loss, Tensor) and loss.item() == pytest.approx(wanted, rel=1e-5)
    plait.activate(model, {})
    assert plait.auxiliary_loss(model) == 0.0


def test_checkpointing_does_not_record_twice_or_lose_gradients(model: nn.Module) -> None:
    adapter = plait.adapters(model)["default"]
    parameters = list(adapter.parameters())

    def gradients(run: Any) -> list[Tensor]:
        loss = run(x()).square().sum() + plait.auxiliary_loss(model)
        return list(torch.autograd.grad(loss, parameters))

    plain = gradients(lambda v: model(v).logits)
    again = gradients(lambda v: checkpoint(lambda u: model(u).logits, v, use_reentrant=False))
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)


def test_two_models_have_a_context_each(model: nn.Module) -> None:
    other = make_model("linear")
    perturb(plait.attach(other, TASKS, seed=1))
    with plait.routing(model, task=2):
        inside = other(x()).logits
    assert torch.equal(inside, other(x()).logits)


# -- rules -----------------------------------------------------------------------------------------


@dataclass
class Logged(plait.Rule):
    """Writes down what is called."""

    factor: float = 1.0

    def setup(self, run: Any) -> None:
        super().setup(run)
        self.log: list[str] = ["setup"]
        assert run.optimizer is None

    def parameter_groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        (group,) = groups
        B, rest = split_group(group, lambda name, p: name.endswith(".B"))
        B["lr"] = self.factor * B["lr"]
        return [B, rest]

    def extra_loss(self) -> Tensor:
        return 0.5 * sum(p.A.square().sum() for p in self.run.pairs())

    def before_step(self) -> None:
        assert all(p.B.grad is not None for p in self.run.pairs())
        self.log.append(f"before {self.run.step}")

    def after_step(self) -> None:
        assert all(p.B.grad is not None for p in self.run.pairs()), "gradients are still there"
        self.log.append(f"after {self.run.step}")

    def finish(self) -> None:
        self.log.append("finish")

    def state_dict(self) -> dict[str, Any]:
        return {"log": list(self.log)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.log = list(state["log"])


def lora() -> tuple[nn.Module, plait.Adapter]:
    model = make_model("linear")
    return model, plait.attach(model, "lora", rank=2, seed=1)


def train(model: nn.Module, run: plait.RuleStack, steps: int) -> None:
    for _ in range(steps):
        (model(x()).logits.square().mean() + run.extra_loss()).backward()
        run.step()


def test_a_bare_loop_calls_every_hook_in_order() -> None:
    model, _ = lora()
    rule = Logged()
    run = plait.RuleStack(model, [rule], lr=1e-2)
    train(model, run, 2)
    run.finish()
    assert rule.log == ["setup", "before 0", "after 1", "before 1", "after 2", "finish"]
    assert all(p.grad is None for p in plait.adapters(model)["default"].parameters())


def test_without_rules_it_is_adamw_alone() -> None:
    model, adapter = lora()
    train(model, plait.RuleStack(model, [], lr=1e-2, weight_decay=0.1), 3)
    other, same = lora()
    optimizer = torch.optim.AdamW(same.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        other(x()).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for key, tensor in adapter.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[key]), key


def test_groups_carry_the_rule_s_rates_and_the_names() -> None:
    model, adapter = lora()
    run = plait.RuleStack(model, [Logged(factor=16)], lr=1e-3)
    B, rest = run.optimizer.param_groups
    assert B["lr"] == 16e-3 and rest["lr"] == 1e-3
    assert B["names"][0] == "default/layers.0.up.B" and len(B["params"]) == 5
    assert {id(p) for g in (B, rest) for p in g["params"]} == {id(p) for p in adapter.parameters()}


def test_the_extra_loss_reaches_the_gradient() -> None:
    model, adapter = lora()
    run = plait.RuleStack(model, [Logged()], lr=1e-2)
    extra = run.extra_loss()
    assert isinstance(extra, Tensor)
    extra.backward()
    for delta in adapter.deltas.values():
        torch.testing.assert_close(delta.A.grad, delta.A.detach())


def test_state_goes_round_and_other_rules_are_refused() -> None:
    model, _ = lora()
    run = plait.RuleStack(model, [Logged()], lr=1e-2)
    train(model, run, 2)
    saved = run.state_dict()
    fresh = plait.RuleStack(lora()[0], [Logged()], lr=1e-2)
    fresh.load_state_dict(saved)
    assert fresh.run.step == 2 and fresh.rules[0].log == saved["rules"][0]["log"]
    with pytest.raises(PlaitError, match="other rules"):
        plait.RuleStack(lora()[0], [], lr=1e-2).load_state_dict(saved)


def test_only_active_adapters_that_require_gradients_train() -> None:
    model, first = lora()
    second = plait.attach(model, "lora", rank=2, name="b", seed=2)
    run = plait.RuleStack(model, [], lr=1e-2)
    assert [a.name for a in run.run.adapters] == ["b"]
    plait.activate(model, ["default", "b"])
    first.requires_grad_(False)
    before = first.state_dict()
    before = {k: t.clone() for k, t in before.items()}
    train(model, plait.RuleStack(model, [], lr=1e-1), 2)
    assert all(torch.equal(t, before[k]) for k, t in first.state_dict().items())
    assert bool(second.deltas["head"].B.any())
    second.requires_grad_(False)
    with pytest.raises(PlaitError, match="nothing to train"):
        plait.RuleStack(model, [], lr=1e-2)


def test_mistakes_in_rules_are_named() -> None:
    model, _ = lora()
    with pytest.raises(PlaitError, match=r"rule 'no-such-rule'|method 'no-such-rule'"):
        make_rule("no-such-rule")
    with pytest.raises(PlaitError, match="is no rule"):
        make_rule("lora")
    with pytest.raises(PlaitError, match=r"one .name: options. pair"):
        make_rule({"a": {}, "b": {}})

    class Twice(plait.Rule):
        def parameter_groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [*groups, *groups]

    with pytest.raises(PlaitError, match="two optimiser groups"):
        plait.RuleStack(model, [Twice()], lr=1e-2)


def test_a_rule_for_pairs_refuses_an_adapter_without_them(model: nn.Module) -> None:
    class Pairs(plait.Rule):
        needs_pairs = True

    with pytest.raises(PlaitError, match="task-scaled-for-tests"):
        plait.RuleStack(model, [Pairs()], lr=1e-2)
    with pytest.raises(PlaitError, match="needs an adapter"):
        plait.RuleStack(make_model("linear"), [Pairs()], lr=1e-2)


def test_schedules_given_as_a_share_of_the_run() -> None:
    model, _ = lora()
    run = plait.RuleStack(model, [], total_steps=200).run
    assert (run.steps(0.1), run.steps(30), run.steps(0), run.steps(0.001)) == (20, 30, 0, 1)
    with pytest.raises(PlaitError, match="total_steps"):
        plait.RuleStack(model, []).run.steps(0.1)


def test_split_group_copies_the_rest() -> None:
    parameters = [(n, nn.Parameter(torch.zeros(1))) for n in ("a.A", "a.B", "b.A")]
    picked, others = split_group(make_group(parameters, 0.1, 0.2), lambda n, p: n.endswith("A"))
    assert picked["names"] == ["a.A", "b.A"] and others["names"] == ["a.B"]
    assert picked["lr"] == others["lr"] == 0.1 and others["weight_decay"] == 0.2
