"""What rules that train base weights, rather than adapters, share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from plait.adapter import Rule, Run, make_group
from plait.adapter.targets import base_modules
from plait.errors import PlaitError


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{path: parameter} of the base model's floating-point weights; a tied one once."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for path, module in base_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen or not parameter.is_floating_point():
                continue
            seen.add(id(parameter))
            found[f"{path}.{name}" if path else name] = parameter
    return found


def train_base(model: nn.Module) -> None:
    """Let every base weight require a gradient."""
    for parameter in base_parameters(model).values():
        parameter.requires_grad_(True)


def base_group(run: Run) -> dict[str, Any]:
    """An optimiser group of all base weights, by name."""
    named = [(f"base/{n}", p) for n, p in base_parameters(run.model).items()]
    return make_group(named, run.lr, run.weight_decay)


class FullTraining(Rule):
    """Every base weight trains: what `method: none` means when no rule says otherwise."""

    needs_adapter = False
    claims = frozenset({"base"})

    def setup(self, run: Run) -> None:
        super().setup(run)
        train_base(run.model)

    def parameter_groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [*groups, base_group(self.run)]


def refuse_several_processes(rule: str, why: str) -> None:
    """DistributedDataParallel fixes the set of parameters when it wraps the model."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        count = distributed.get_world_size()
        if count > 1:
            raise PlaitError(f"rule {rule} {why}, which {count} processes cannot; train on one.")
