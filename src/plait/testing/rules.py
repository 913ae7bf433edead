"""What every rule must do, whatever it is about: checks over a tiny language model.

    plait.testing.check_rule("lora-pro")        # or your own Method with a rule

A rule is tried on the adapter that it stands for: the method's own, LoRA for a bare rule, none for
rules that train base weights. That the Trainer goes where the bare loop goes, on one process and on
two, is checked by the project's own tests in the same way for every rule.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plait.adapter import Adapter, Method, Rule, RuleStack, attach, get_method, method_names
from plait.adapter.formats import load
from plait.errors import PlaitError, unknown
from plait.testing.case import NotApplicable, known
from plait.testing.models import VOCABULARY, tiny_llama

STEPS, ROWS, LENGTH = 6, 4, 7
RATES = (3e-2, 3e-3, 0.3)
State = dict[str, Tensor]


@dataclass(frozen=True)
class RuleCase:
    """One rule on one tiny language model."""

    method: Method
    dtype: torch.dtype = torch.float64
    lr: float = 1e-2
    checkpointing: bool = False

    def __str__(self) -> str:
        return f"rule {self.method.name}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def rule(self) -> Rule:
        assert self.method.rule is not None
        made: Rule = self.method.rule(**self.method.rule_example)
        return made

    @property
    def bare(self) -> bool:
        """A rule that any adapter (or the base) can train under."""
        return self.method.axis == "rule" and self.method.delta is None

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1234)
            model = tiny_llama()
        model.to(self.dtype)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if self.checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})  # type: ignore[operator]
        return model.train()

    def attach(self, model: nn.Module) -> Adapter | None:
        if not self.bare:
            start = self.method.initializer
            data = self.batches(2) if start is not None and start().needs else None
            given = dict(self.method.example) or {"rank": 4}
            if "dropout" in getattr(self.method.options, "__dataclass_fields__", {}):
                given["dropout"] = 0.0  # its masks are no part of a rule
            return attach(model, self.method, seed=1, data=data, **given)
        return attach(model, "lora", rank=4, seed=1) if self.rule.needs_adapter else None

    def stack(self, model: nn.Module, rules: Sequence[Any] | None = None) -> RuleStack:
        try:
            return RuleStack(
                model,
                [self.rule] if rules is None else rules,
                lr=self.lr,
                total_steps=STEPS,
                seed=5,
                validation=self.batches(2, seed=9),
            )
        except PlaitError as refusal:
            if self.checkpointing and "checkpointing" in str(refusal):
                raise NotApplicable(str(refusal)) from refusal
            raise

    def batches(self, count: int = STEPS, seed: int = 0) -> list[dict[str, Tensor]]:
        g = torch.Generator().manual_seed(seed)
        drawn = [torch.randint(VOCABULARY, (ROWS, LENGTH), generator=g) for _ in range(count)]
        return [{"input_ids": ids, "labels": ids} for ids in drawn]


def train(
    model: nn.Module, run: RuleStack, batches: Sequence[Any], parts: int = 1, clip: float = 0.0
) -> list[float]:
    """The bare loop, each batch in `parts` micro-batches; returns the losses."""
    losses = []
    for batch in batches:
        total = 0.0
        for piece in zip(*(t.chunk(parts) for t in batch.values()), strict=True):
            loss = model(**dict(zip(batch, piece, strict=True))).loss
            ((loss + run.extra_loss()) / parts).backward()
            total += float(loss.detach()) / parts
        if clip:
            trained = [p for g in run.optimizer.param_groups for p in g["params"]]
            torch.nn.utils.clip_grad_norm_(trained, clip)
        run.step()
        losses.append(total)
    return losses


def state_of(model: nn.Module, adapter: Adapter | None) -> State:
    """What trained, detached copies by name."""
    own = model.state_dict() if adapter is None else adapter.state_dict()
    return {name: tensor.detach().clone() for name, tensor in own.items()}


def _trained(case: RuleCase, rules: Any = None, **how: Any) -> tuple[State, list[float]]:
    model = case.model()
    adapter = case.attach(model)
    run = case.stack(model, rules)
    losses = train(model, run, case.batches(), **how)
    run.finish()
    return state_of(model, adapter), losses


def _same(one: State, two: State, tolerance: float, what: str) -> None:
    assert one.keys() == two.keys(), f"{what}: other tensors, {sorted(one.keys() ^ two.keys())[:3]}"
    for name, value in one.items():
        other = two[name]
        assert value.shape == other.shape, f"{what}: {name} is {value.shape} and {other.shape}"
        if not value.is_floating_point():
            assert torch.equal(value, other), f"{what}: {name} differs"
            continue
        gap = float((value - other).abs().max()) if value.numel() else 0.0
        size = max(1.0, float(value.abs().max()) if value.numel() else 0.0)
        assert gap <= tolerance * size, f"{what}: {name} differs by {gap:.2e}"


# -- the checks -----------------------------------------------------------------------------------


def same_seed_same_run(case: RuleCase) -> None:
    """Two runs of one seed are equal bit for bit."""
    _same(_trained(case)[0], _trained(case)[0], 0.0, "a second run")


def acts(case: RuleCase) -> None:
    """Training goes elsewhere than under plain AdamW."""
    if not case.bare or not case.rule.needs_adapter:
        raise NotApplicable("nothing to compare with: the rule belongs to its adapter")
    with_rule, without = _trained(case)[0], _trained(case, rules=[])[0]
    try:
        _same(with_rule, without, 1e-9, "")
    except AssertionError:
        return
    raise AssertionError("the rule changes nothing")


def resumes(case: RuleCase) -> None:
    """Saved after half the steps and taken up in another process: the uninterrupted run."""
    whole, _ = _trained(case)
    half, batches = STEPS // 2, case.batches()
    model = case.model()
    adapter = case.attach(model)
    run = case.stack(model)
    train(model, run, batches[:half])
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "state.pt"
        torch.save([run.optimizer.state_dict(), run.state_dict()], saved)
        if adapter is None:
            weights, model = model.state_dict(), case.model()
            model.load_state_dict(weights)
        else:
            adapter.save(Path(folder) / "adapter")
            model = case.model()
            adapter = load(model, Path(folder) / "adapter", adapter.name, trainable=True)
        run = case.stack(model)
        optimizer, rules = torch.load(saved, weights_only=True)
    run.optimizer.load_state_dict(optimizer)
    run.load_state_dict(rules)
    train(model, run, batches[half:])
    run.finish()
    _same(whole, state_of(model, adapter), 1e-12, "a resumed run")


def accumulates(case: RuleCase) -> None:
    """Two micro-batches take the step of the whole batch."""
    if not case.rule.splits_batches:
        raise NotApplicable("the rule declares that its step depends on the micro-batches")
    _same(_trained(case)[0], _trained(case, parts=2)[0], 1e-6, "accumulated micro-batches")


def works_with_checkpointing(case: RuleCase) -> None:
    """Gradient checkpointing takes the same steps."""
    again = replace(case, checkpointing=True)
    _same(_trained(case)[0], _trained(again)[0], 1e-6, "with gradient checkpointing")


def clips(case: RuleCase) -> None:
    """A clip that never bites changes nothing; one that does leaves all weights finite."""
    _same(_trained(case)[0], _trained(case, clip=1e9)[0], 1e-12, "with a loose clip")
    for name, value in _trained(case, clip=1e-3)[0].items():
        assert torch.isfinite(value).all(), f"{name} is not finite with clipped gradients"


def works_in_half_precision(case: RuleCase) -> None:
    """A bfloat16 base, and autocast over a float32 one, train as float32 does, roughly."""
    _, exact = _trained(replace(case, dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = {"autocast": _trained(replace(case, dtype=torch.float32))}
    found["bfloat16"] = _trained(replace(case, dtype=torch.bfloat16))
    for name, (state, losses) in found.items():
        for key, value in state.items():
            assert torch.isfinite(value.float()).all(), f"{key} is not finite in {name}"
        gap = max(abs(a / b - 1) for a, b in zip(losses, exact, strict=True))
        assert gap < 0.1, f"losses in {name} are off by {gap:.0%}"


def a_rate_of_zero_moves_nothing(case: RuleCase) -> None:
    """With a learning rate of 0 the model answers what it answered."""
    case = replace(case, lr=0.0)
    model = case.model()
    case.attach(model)
    (batch,) = case.batches(1)
    with torch.no_grad():
        before = model.eval()(**batch).logits
    run = case.stack(model.train())
    train(model, run, case.batches())
    run.finish()
    with torch.no_grad():
        after = model.eval()(**batch).logits
    gap = float((after - before).abs().max())
    assert gap <= 1e-9 * float(before.abs().max()), f"logits moved by {gap:.2e}"


def loss_falls(case: RuleCase) -> None:
    """Thirty steps on one batch lower its loss by a tenth, at one of three rates."""
    falls = []
    for lr in RATES:
        tried = replace(case, lr=lr)
        model = tried.model()
        tried.attach(model)
        run = RuleStack(
            model, [tried.rule], lr=lr, total_steps=30, seed=5, validation=tried.batches(2)
        )
        losses = train(model, run, tried.batches(1) * 30)
        run.finish()
        (batch,) = tried.batches(1)
        with torch.no_grad():
            last = float(model.eval()(**batch).loss)
        falls.append(f"lr {lr}: {losses[0]:.3f} to {last:.3f}")
        if last < 0.9 * losses[0]:
            return
    raise AssertionError("the loss does not fall: " + "; ".join(falls))


def leaves_nothing_behind(case: RuleCase) -> None:
    """After `finish`: no hook, an untouched base, and an adapter that a file brings back."""
    model = case.model()
    base = state_of(model, None)
    adapter = case.attach(model)
    hooks = _hooks(model)
    run = case.stack(model)
    train(model, run, case.batches())
    run.finish()
    assert _hooks(model) == hooks, "a hook is left on the model"
    if adapter is None:
        return
    adapter.check()
    for name, value in model.state_dict().items():
        assert torch.equal(value, base[name]), f"{name} of the base moved"
    (batch,) = case.batches(1)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        adapter.save(Path(folder) / "adapter")
        other = case.model().eval()
        load(other, Path(folder) / "adapter")
        gap = (model.eval()(**batch).logits - other(**batch).logits).abs().max()
    assert float(gap) <= 1e-9, f"the adapter read from its file answers otherwise, by {gap:.2e}"


def _hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    count = sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)
    found = [p for p in model.parameters() if p.requires_grad]
    return count + sum(len(getattr(p, "_post_accumulate_grad_hooks", None) or ()) for p in found)


RULE_CHECKS: dict[str, Callable[[RuleCase], None]] = {
    check.__name__: check
    for check in (
        same_seed_same_run,
        acts,
        resumes,
        accumulates,
        works_with_checkpointing,
        clips,
        works_in_half_precision,
        a_rate_of_zero_moves_nothing,
        loss_falls,
        leaves_nothing_behind,
    )
}
"""{property: the function that checks it on a `RuleCase`, raising AssertionError}."""


def rule_names() -> list[str]:
    """The registered methods that have a rule."""
    return [name for name in method_names() if get_method(name).rule is not None]


def check_rule(method: str | Method, *, checks: Collection[str] | None = None) -> int:
    """Try every property on a method's rule; returns how many held.

    Raises AssertionError naming every property that does not hold, and PlaitError for an unknown
    check or a method without a rule.
    """
    method = get_method(method)
    if method.rule is None:
        raise PlaitError(f"method {method.name!r} has no rule (axis: {method.axis}).")
    for name in checks or ():
        if name not in RULE_CHECKS:
            raise unknown("check", name, RULE_CHECKS)
    held, failed = 0, []
    with known(method):
        for name, check in RULE_CHECKS.items():
            if checks is not None and name not in checks:
                continue
            try:
                check(RuleCase(method))
                held += 1
            except NotApplicable:
                continue
            except Exception as e:  # a crash is a failure like another
                failed.append(f"{name}: {type(e).__name__}: {e}")
    if failed:
        raise AssertionError(f"{method.name}: {len(failed)} failed\n  " + "\n  ".join(failed))
    return held
