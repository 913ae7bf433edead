"""What `methods.py` times: one training step of a method in Plait, in PEFT, of LoRA and of nothing.

A contender is a model of its own (a full copy: some methods write base weights), a step (forward,
backward, optimiser, with the method's own rule where it brings one) and facts about how it came
to be.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from models import frozen, random_batch
from torch import nn

import plait
from plait.adapter import Method, Site
from plait.adapter.build import choose_deltas
from plait.rules._base_weights import FullTraining

REFERENCE = {"rank": 8}
TOTAL_STEPS = 1000
DATA_ROWS = 8
"""Rows shown to initialisers that look at data."""
MOST = 512
"""Largest value tried for an option that is to reach LoRA's budget."""


@dataclass
class Contender:
    step: Callable[[], None]
    facts: dict[str, Any] = field(default_factory=dict)


class Clock:
    """CPU seconds spent in the functions that it wraps, nested calls counted once."""

    def __init__(self) -> None:
        self.seconds, self.depth = 0.0, 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if self.depth == 0:
                    self.seconds += time.process_time() - start

        return timed


# -- Plait ----------------------------------------------------------------------------------------


def bound(base: nn.Module, batch: dict[str, Any]) -> Contender:
    """The frozen base's forward and backward of activations: what any adapter must pay."""
    model = frozen(copy.deepcopy(base))
    return Contender(lambda: model(**batch).loss.backward())


def ours(base: nn.Module, batch: dict[str, Any], name: str, options: dict[str, Any]) -> Contender:
    """A method with its own rule and start; a bare rule drives LoRA (or the base) instead."""
    method, model = plait.get_method(name), frozen(copy.deepcopy(base))
    attachable = method.delta is not None or method.choose is not None
    rules: list[Any] = [name] if method.rule is not None else []
    facts: dict[str, Any] = {"options": options}
    adapter, context = None, {}
    if attachable or method.rule.needs_adapter:
        own = method if attachable else plait.get_method("lora")
        adapter, seconds = _attach(model, own, options)
        facts |= seconds
        context = own.example_context
        facts["file_bytes"] = _file_bytes(adapter)
    run = plait.RuleStack(
        model.train(), rules, lr=1e-4, total_steps=TOTAL_STEPS, validation=[batch]
    )
    facts["parameters"] = _trained(run.optimizer)

    def step() -> None:
        with plait.routing(model, **context) if context else contextlib.nullcontext():
            (model(**batch).loss + run.extra_loss()).backward()
        run.step()

    return Contender(step, facts)


def full(base: nn.Module, batch: dict[str, Any]) -> Contender:
    """AdamW on every base weight: what rules that train base weights are an economy of."""
    model = frozen(copy.deepcopy(base)).train()
    run = plait.RuleStack(model, [FullTraining()], lr=1e-4, total_steps=TOTAL_STEPS)

    def step() -> None:
        model(**batch).loss.backward()
        run.step()

    return Contender(step, {"parameters": _trained(run.optimizer)})


def _attach(model: nn.Module, method: Method, options: dict[str, Any]) -> tuple[Any, dict]:
    """The adapter, CPU seconds of the whole `attach`, and those that went into its start."""
    clock = Clock()
    with _clocked(clock, model, method, options):
        start = time.process_time()
        adapter = plait.attach(model, method, seed=0, data=_data(model, method), **options)
        seconds = time.process_time() - start
    return adapter, {"attach_s": seconds, "start_s": clock.seconds}


@contextlib.contextmanager
def _clocked(
    clock: Clock, model: nn.Module, method: Method, options: dict[str, Any]
) -> Iterator[None]:
    """Time what writes starts: the deltas' `reset` and the initialiser's two passes."""
    owners = {(cls, "reset") for _, cls in pieces_of(model, method, options)}
    if method.initializer is not None:
        owners |= {(method.initializer, "collect"), (method.initializer, "start")}
    with contextlib.ExitStack() as stack:
        for owner, name in sorted(owners, key=str):
            wrapped = clock.wrap(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, wrapped))
        yield


def _data(model: nn.Module, method: Method) -> list[dict[str, Any]] | None:
    if method.initializer is None or not method.initializer.needs:
        return None
    rows = random_batch(model, DATA_ROWS, 64)
    return [{k: t[i : i + 4] for k, t in rows.items()} for i in range(0, DATA_ROWS, 4)]


def _trained(optimizer: torch.optim.Optimizer) -> int:
    found = [p for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
    return sum(p.numel() for p in found)


def _file_bytes(adapter: plait.Adapter) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return _size(adapter.save(Path(folder) / "adapter"))


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


# -- LoRA's budget --------------------------------------------------------------------------------


def pieces_of(model: nn.Module, method: Method, options: dict[str, Any]) -> list[tuple[Site, Any]]:
    """(site, delta class) of every site that the method takes by default."""
    sites = None
    if method.choose is None:
        sites = plait.find_sites(model, method.targets, kinds=method.kinds)
    return choose_deltas(method, model, sites, method.options(**options))


def budget_options(
    model: nn.Module, method: Method, target: int, within: float = 0.08
) -> dict[str, Any] | None:
    """The one integer option (a rank, if there is one) that brings the method's own count of
    parameters to `target`; None where none does, {} where the defaults do."""
    if method.count is None or (method.delta is None and method.choose is None):
        return None
    sites = [site for site, _ in pieces_of(model, method, {})]

    def distance(options: dict[str, Any]) -> float:
        try:
            return abs(method.count(sites, method.options(**options)) / target - 1)  # type: ignore[misc]
        except (plait.PlaitError, ZeroDivisionError):
            return float("inf")  # a value that the option may not have

    if distance({}) <= within:
        return {}
    found = {f.name: f.default for f in dataclasses.fields(method.options)}
    knobs = [n for n, v in found.items() if (type(v) is int and v > 0) or (n, v) == ("rank", None)]
    for knob in sorted(knobs, key=lambda name: name != "rank"):
        best = min(range(1, MOST + 1), key=lambda n, knob=knob: distance({knob: n}))
        if distance({knob: best}) <= within:
            return {knob: best}
    return None


# -- PEFT -----------------------------------------------------------------------------------------

PEFT_OPTIONS = {"delora": {"start": "zero"}}
"""Options without which PEFT has no form of a method (its DeLoRA subtracts no start)."""
STARTS = {"pissa": "pissa_niter_4", "olora": "olora"}
"""Initialisers that PEFT knows under a name and without data."""


def theirs(
    base: nn.Module, batch: dict[str, Any], name: str, options: dict[str, Any]
) -> Contender | None:
    """PEFT's form of the same method with the same options, or None where it has none.

    The configuration is what Plait writes for PEFT, so that the two cannot differ.
    """
    from peft import get_peft_model

    model = frozen(copy.deepcopy(base))
    config = _peft_config(base, name, options)
    if config is None:
        return None
    start = time.process_time()
    wrapped = get_peft_model(model, config).train()
    facts: dict[str, Any] = {"attach_s": time.process_time() - start}
    optimizer = _peft_optimizer(name, wrapped)
    facts["parameters"] = _trained(optimizer)
    with tempfile.TemporaryDirectory() as folder:
        wrapped.save_pretrained(folder)
        facts["file_bytes"] = _size(Path(folder))
    allocate = getattr(wrapped.base_model, "update_and_allocate", None)
    done = 0

    def step() -> None:
        nonlocal done
        wrapped(**batch).loss.backward()
        optimizer.step()
        if allocate is not None:
            allocate(done)
        optimizer.zero_grad(set_to_none=True)
        done += 1

    return Contender(step, facts)


def _peft_config(base: nn.Module, name: str, options: dict[str, Any]) -> Any:
    from peft import LoraConfig, PeftConfig

    method = plait.get_method(name)
    if name in STARTS or name in OPTIMIZERS:
        targets = "all-linear"
        start = STARTS.get(name, True)
        return LoraConfig(r=8, lora_alpha=16, target_modules=targets, init_lora_weights=start)
    if method.peft is None:
        return None
    model = copy.deepcopy(base)
    adapter = plait.attach(model, method, seed=0, **PEFT_OPTIONS.get(name, {}), **options)
    with tempfile.TemporaryDirectory() as folder:
        config = PeftConfig.from_pretrained(str(adapter.save(Path(folder) / "a", format="peft")))
    config.inference_mode = False
    if hasattr(config, "total_step"):
        config.total_step, config.tinit, config.tfinal = TOTAL_STEPS, 100, 300
    return config


def _lora_plus(model: Any) -> torch.optim.Optimizer:
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(
        model, optimizer_cls=torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16
    )


def _lora_fa(model: Any) -> torch.optim.Optimizer:
    from peft.optimizers import create_lorafa_optimizer

    return create_lorafa_optimizer(model, r=8, lora_alpha=16, lr=1e-4)


OPTIMIZERS = {"lora-plus": _lora_plus, "lora-fa": _lora_fa}
"""Rules that PEFT has as optimisers over its LoRA."""


def _peft_optimizer(name: str, model: Any) -> torch.optim.Optimizer:
    if name in OPTIMIZERS:
        return OPTIMIZERS[name](model)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
