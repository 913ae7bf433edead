"""`Rule`: how parameters move. `RuleStack`: several rules over one optimiser, in any training loop.

A bare loop:

    run = plait.RuleStack(model, ["lora-plus", LoraPro()], lr=1e-4, total_steps=1000)
    for batch in batches:
        loss = model(**batch).loss + run.extra_loss()
        loss.backward()
        run.step()

Hugging Face's Trainer calls the same hooks from a callback, with the same result: `before_step`
when gradients are final (accumulated, unscaled, clipped), `after_step` once the optimiser has
moved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from plait.adapter.adapter import Adapter
from plait.adapter.method import Method
from plait.adapter.registry import get_method
from plait.adapter.replacement import is_extra
from plait.adapter.state import find_state
from plait.adapter.together import conflicts
from plait.errors import PlaitError, unknown

D = TypeVar("D")
OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


@dataclass(eq=False)
class Run:
    """What every rule of one training run sees."""

    model: nn.Module
    adapters: list[Adapter]
    """The adapters that train (active and requiring gradients)."""
    lr: float
    weight_decay: float = 0.0
    total_steps: int | None = None
    seed: int = 0
    step: int = 0
    """Optimiser steps done."""
    optimizer: torch.optim.Optimizer | None = None
    validation: Sequence[Any] | None = None
    """Batches for rules that learn on held-out data (what the model is called with)."""

    def pairs(self) -> list[Any]:
        return [p for a in self.adapters for p in a.pairs()]

    def deltas(self, kind: type[D]) -> dict[str, D]:
        """{"adapter/site path": delta} of the deltas of this class; a head that trains along is of
        another."""
        named = ((f"{a.name}/{path}", d) for a in self.adapters for path, d in a.deltas.items())
        return {name: delta for name, delta in named if isinstance(delta, kind)}

    def steps(self, share_or_count: float) -> int:
        """A number of steps: taken as a share of the run when below 1."""
        if share_or_count >= 1 or share_or_count == 0:
            return int(share_or_count)
        if self.total_steps is None:
            raise PlaitError("a schedule given as a share of the run needs total_steps.")
        return max(1, round(share_or_count * self.total_steps))


class Rule:
    """One optimisation rule. Subclasses are dataclasses whose fields are the options.

    The defaults do nothing, so that a rule overrides only what it is about.
    """

    needs_adapter: bool = True
    needs_pairs: bool = False
    """Every delta must offer (A, B) pairs."""
    claims: frozenset[str] = frozenset()
    """What no other rule of the run may have: keys of `plait.adapter.together.CLAIMS`."""
    keeps_shapes: bool = False
    """Keeps a state of the parameters' shapes outside the optimiser from step to step."""
    splits_batches: bool = True
    """Micro-batches that are accumulated give the step of the whole batch."""
    run: Run

    def check(self, run: Run) -> None:
        """Raise PlaitError when this rule cannot work on these adapters (asks traits, not
        names)."""
        name = type(self).__name__
        if self.needs_adapter and not run.adapters:
            raise PlaitError(f"rule {name} needs an adapter that trains; attach one first.")
        if not self.needs_pairs:
            return
        for adapter in run.adapters:
            # A head that trains along has no pairs, whatever the method.
            own = {path for path, delta in adapter.deltas.items() if not is_extra(delta)}
            without = own - {p.path for p in adapter.pairs()}
            if without:
                raise PlaitError(
                    f"rule {name} needs (A, B) pairs, which {adapter.method.name!r} does not have "
                    f"at {sorted(without)[0]!r}; use a method such as lora."
                )

    def setup(self, run: Run) -> None:
        """Called once, before the optimiser exists."""
        self.run = run

    def optimizer(self) -> OptimizerFactory | None:
        """The optimiser this rule needs underneath (parameter groups -> optimiser), or None."""
        return None

    def parameter_groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Change the optimiser's groups (dicts with `params`, `names`, `lr`, `weight_decay`)."""
        return groups

    def extra_loss(self) -> Tensor | None:
        """A term added to the loss of every micro-batch."""
        return None

    def before_step(self) -> None:
        """Gradients are final; the optimiser has not moved."""

    def after_step(self) -> None:
        """The optimiser has moved; gradients are still there."""

    def finish(self) -> None:
        """Called after the last step, before saving."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise PlaitError(
                f"rule {type(self).__name__} keeps no state, but the checkpoint has some."
            )


def make_rule(spec: str | Rule | dict[str, Any]) -> Rule:
    """A rule from its name, `{name: {option: value}}`, or an instance."""
    if isinstance(spec, Rule):
        return spec
    options: dict[str, Any] = {}
    if isinstance(spec, dict):
        if len(spec) != 1:
            raise PlaitError(f"a rule is a name or one {{name: options}} pair, not {spec!r}.")
        (spec, given), *_ = spec.items()
        options = dict(given or {})
    method = get_method(spec)
    if method.rule is None:
        raise PlaitError(f"method {method.name!r} is no rule (axis: {method.axis}).")
    known = {f.name for f in dataclasses.fields(method.rule)}
    for name in options:
        if name not in known:
            raise unknown("option", name, known, where=f"rule {method.name!r}")
    return method.rule(**options)


def with_own_rules(rules: Sequence[Rule], methods: Iterable[Method]) -> list[Rule]:
    """The rules, behind those that the methods bring and the list lacks."""
    brought: list[Rule] = []
    for method in methods:
        own = method.rule
        if own is not None and not any(isinstance(rule, own) for rule in (*brought, *rules)):
            brought.append(own())
    return [*brought, *rules]


@dataclass(eq=False)
class RuleStack:
    """Rules in order over one optimiser.

    Args:
        model: with the adapters that train attached and active.
        rules: names, `{name: options}` or instances. A rule that an adapter's method brings (as
            `adalora` does) comes first by itself, with its defaults, unless it is in the list.
        optimizer_factory: makes the optimiser from parameter groups; None is torch's AdamW.
        validation: batches (what `model` is called with) for rules that learn on held-out data.

    Raises PlaitError where a rule cannot work on these adapters, or two rules not together.
    """

    model: nn.Module
    rules: Sequence[Any] = ()
    lr: float = 1e-4
    weight_decay: float = 0.0
    total_steps: int | None = None
    seed: int = 0
    optimizer_factory: OptimizerFactory | None = None
    validation: Sequence[Any] | None = None
    run: Run = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        adapters = training_adapters(self.model)
        self.rules = with_own_rules(
            [make_rule(r) for r in self.rules], [a.method for a in adapters]
        )
        self.run = Run(
            self.model,
            adapters,
            self.lr,
            self.weight_decay,
            self.total_steps,
            self.seed,
            validation=self.validation,
        )
        for reason in conflicts(self.rules):
            raise PlaitError(reason)
        for rule in self.rules:
            rule.check(self.run)
        for rule in self.rules:
            rule.setup(self.run)
        factory = self._wanted_optimizer() or self.optimizer_factory or torch.optim.AdamW
        self.optimizer = factory(self.parameter_groups())
        self.run.optimizer = self.optimizer

    def _wanted_optimizer(self) -> OptimizerFactory | None:
        return next((f for rule in self.rules if (f := rule.optimizer()) is not None), None)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimiser's groups after every rule had its say; each trained tensor once."""
        groups = default_groups(self.run)
        for rule in self.rules:
            groups = rule.parameter_groups(groups)
        groups = [g for g in groups if g["params"]]
        seen = [id(p) for g in groups for p in g["params"]]
        if len(seen) != len(set(seen)):
            raise PlaitError("a parameter stands in two optimiser groups; check the rules' groups.")
        if not groups:
            raise PlaitError("nothing to train: no active adapter requires gradients.")
        return groups

    def extra_loss(self) -> Tensor | float:
        """What the rules, and the active adapters' routers, add to the loss."""
        terms = [rule.extra_loss() for rule in self.rules]
        terms += [a.auxiliary_loss() for a in self.run.adapters]
        found = [t for t in terms if t is not None]
        return torch.stack(found).sum() if found else 0.0

    def before_step(self) -> None:
        for rule in self.rules:
            rule.before_step()

    def after_step(self) -> None:
        self.run.step += 1
        for rule in self.rules:
            rule.after_step()

    def step(self) -> None:
        """One optimiser step with every hook; gradients are cleared after it."""
        self.before_step()
        self.optimizer.step()
        self.after_step()
        self.optimizer.zero_grad(set_to_none=True)

    def finish(self) -> None:
        for rule in self.rules:
            rule.finish()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.run.step, "rules": [r.state_dict() for r in self.rules]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["rules"]) != len(self.rules):
            raise PlaitError("the checkpoint was made with other rules; resume with the same list.")
        self.run.step = int(state["step"])
        for rule, saved in zip(self.rules, state["rules"], strict=True):
            rule.load_state_dict(saved)


def training_adapters(model: nn.Module) -> list[Adapter]:
    """Active adapters of which some parameter requires a gradient."""
    state = find_state(model)
    if state is None:
        return []
    active = [state.adapters[name] for name in state.active]
    return [a for a in active if any(p.requires_grad for p in a.parameters())]


def default_groups(run: Run) -> list[dict[str, Any]]:
    """One group with every trained adapter parameter, by name."""
    named = [
        (f"{a.name}/{n}", p)
        for a in run.adapters
        for n, p in a.named_parameters()
        if p.requires_grad
    ]
    return [make_group(named, run.lr, run.weight_decay)]


def make_group(
    named: Iterable[tuple[str, nn.Parameter]], lr: float, weight_decay: float
) -> dict[str, Any]:
    """An optimiser group that remembers its parameters' names."""
    pairs = list(named)
    return {
        "params": [p for _, p in pairs],
        "names": [n for n, _ in pairs],
        "lr": lr,
        "weight_decay": weight_decay,
    }


def split_group(
    group: dict[str, Any], chosen: Callable[[str, nn.Parameter], bool]
) -> tuple[Any, Any]:
    """A group as two: the parameters that `chosen` picks, and the rest; other keys are copied."""
    named = list(zip(group["names"], group["params"], strict=True))
    rest = {k: v for k, v in group.items() if k not in ("params", "names")}
    picked = [(n, p) for n, p in named if chosen(n, p)]
    others = [(n, p) for n, p in named if not chosen(n, p)]
    make = lambda items: {**rest, "params": [p for _, p in items], "names": [n for n, _ in items]}  # noqa: E731
    return make(picked), make(others)
