"""What a recipe will do, told before any data is read: sites, sizes, memory, what cannot be.

Predicted peak of memory, in bytes, for T = batch_size * max_length tokens a step:

    weights      all parameters and buffers, as they are stored
    training     trained numbers * 12 (gradient and AdamW's two moments, float32), plus 4 for an
                 adapter's own values
    blocks       T * tensors kept for backward in every block (`saved_per_token`); with
                 gradient checkpointing T * hidden * bytes a block, and one block in full
    logits       T * vocabulary * (what the base's dtype takes, and 8: float32 log-probabilities
                 and their gradient; 4 more for a float32 copy of half-precision logits)

It is an estimate for Llama-like models: fragmentation, the framework itself (about 0.5 GB) and
states that rules keep beyond AdamW's are not in it. Batches shorter than `max_length` take less.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from plait.adapter import (
    Adapter,
    Initializer,
    Rule,
    Run,
    attach,
    detach,
    find_blocks,
    get_method,
    make_rule,
)
from plait.adapter.rule import training_adapters, with_own_rules
from plait.adapter.targets import base_modules
from plait.adapter.together import conflicts
from plait.errors import PlaitError
from plait.rules._base_weights import FullTraining, base_parameters
from plait.training.recipe import Recipe


class _Untouched(Initializer):
    """Leaves every delta at its own reset: a trial adapter needs no data and no decomposition."""

    def start(self, delta: Any, statistics: Any) -> None:
        pass


@dataclass
class DryRun:
    """The facts; `str()` is what is printed."""

    recipe: Recipe
    sites: list[str] = field(repr=False)
    by_type: dict[str, int]
    trainable: int
    total: int
    adapter_bytes: int
    memory: dict[str, int]
    """Predicted bytes by part; see the module."""
    refusals: list[str]
    """Why this cannot run; empty when it can."""

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    def __str__(self) -> str:
        r = self.recipe
        types = ", ".join(f"{n} {t}" for t, n in self.by_type.items())
        lines = [
            f"{r.method} on {r.base}: {len(self.sites)} sites" + (f" ({types})" if types else "")
        ]
        if self.sites:
            more = ", ..." if len(self.sites) > 3 else ""
            lines.append(f"  {', '.join(self.sites[:3])}{more}")
        share = 100 * self.trainable / max(1, self.total)
        lines.append(f"trainable {self.trainable:,} of {self.total:,} numbers ({share:.2f} %)")
        if self.adapter_bytes:
            lines.append(f"adapter file {_bytes(self.adapter_bytes)}")
        parts = ", ".join(f"{name} {_bytes(size)}" for name, size in self.memory.items())
        lines.append(f"predicted peak memory {_bytes(self.peak)} ({parts})")
        lines += [f"refused: {reason}" for reason in self.refusals]
        return "\n".join(lines)


def dry_run(model: nn.Module, recipe: Recipe) -> DryRun:
    """What `recipe` will do to `model`, which is left as it was.

    Raises PlaitError for what cannot even be looked at (targets that match nothing, unknown names).
    """
    rules = make_rules(recipe)
    adapter = None if recipe.method == "none" else attach_trial(model, recipe)
    try:
        refusals = _refusals(model, recipe, rules)
        return _facts(model, recipe, adapter, refusals)
    finally:
        if adapter is not None:
            detach(model, adapter.name)


def attach_trial(model: nn.Module, recipe: Recipe) -> Adapter:
    """The recipe's adapter without its initialiser (which may need data or time)."""
    return attach(model, recipe.method, initializer=_Untouched(), **attach_arguments(recipe))


def attach_arguments(recipe: Recipe) -> dict[str, Any]:
    """What `plait.attach` is given, but for the initialiser and its data."""
    return {
        "name": recipe.name,
        "targets": recipe.targets,
        "exclude": recipe.exclude,
        "layers": recipe.layers,
        "overrides": recipe.overrides,
        "train_modules": recipe.train_modules,
        "seed": recipe.seed,
        **recipe.options,
    }


def make_rules(recipe: Recipe) -> list[Rule]:
    """The recipe's rules, the method's own first; full training where nothing else trains."""
    rules = [make_rule(r) for r in recipe.rules]
    if recipe.method == "none":
        if all(rule.needs_adapter for rule in rules):
            return [FullTraining(), *rules]
        return rules
    return with_own_rules(rules, [get_method(recipe.method)])


def _refusals(model: nn.Module, recipe: Recipe, rules: Sequence[Rule]) -> list[str]:
    found = []
    if recipe.method == "none" and (recipe.initializer or recipe.options):
        found.append("method 'none' has no adapter, so it takes no initializer and no options.")
    total = recipe.steps  # epochs need the data: schedules given as shares are then not checked
    run = Run(model, training_adapters(model), recipe.lr, recipe.weight_decay, total, recipe.seed)
    for rule in rules:
        try:
            rule.check(run)
        except PlaitError as e:
            if total is not None or "total_steps" not in str(e):
                found.append(str(e))
    return found + conflicts(rules)


def _facts(
    model: nn.Module, recipe: Recipe, adapter: Adapter | None, refusals: list[str]
) -> DryRun:
    base = base_parameters(model)
    total = sum(p.numel() for p in base.values())
    trainable = total if adapter is None else adapter.num_parameters()
    sites = [] if adapter is None else list(adapter.deltas)
    stored = {} if adapter is None else adapter.state_dict()
    return DryRun(
        recipe=recipe,
        sites=sites,
        by_type=dict(Counter(path.rpartition(".")[2] for path in sites)),
        trainable=trainable,
        total=total + (0 if adapter is None else trainable),
        adapter_bytes=sum(t.numel() * t.element_size() for t in stored.values()),
        memory=predict_memory(model, recipe, trainable),
        refusals=refusals,
    )


def predict_memory(model: nn.Module, recipe: Recipe, trainable: int) -> dict[str, int]:
    """Predicted peak bytes by part (the formula stands at the top of this module)."""
    base = base_parameters(model)
    size = next((p.element_size() for p in base.values()), 4)
    tokens = recipe.batch_size * recipe.max_length
    config = getattr(model, "config", None)
    vocabulary = int(getattr(config, "vocab_size", 0) or 0)
    blocks = [block for _, block in find_blocks(model)]
    per_token = [saved_per_token(block) * size for block in blocks]
    if recipe.gradient_checkpointing and blocks:
        hidden = int(getattr(config, "hidden_size", 0) or 0)
        kept = tokens * (hidden * size * len(blocks) + max(per_token))
    else:
        kept = tokens * sum(per_token)
    weights = sum(p.numel() * p.element_size() for p in base.values())
    weights += sum(b.numel() * b.element_size() for _, m in base_modules(model) for b in _own(m))
    own = 4 if recipe.method != "none" else 0
    return {
        "weights": weights,
        "training": trainable * (12 + own),
        "blocks": kept,
        "logits": tokens * vocabulary * (size + 8 + (4 if size < 4 else 0)),
    }


def _own(module: nn.Module) -> list[torch.Tensor]:
    return [b for b in module._buffers.values() if b is not None]


def saved_per_token(block: nn.Module) -> int:
    """Numbers that one block keeps for backward per token.

    What follows a linear keeps its output (attention, the gated activation); a linear keeps its
    input, shared by siblings that read the same one; the activation keeps one more of the widest,
    and the two norms their inputs. Within 5 % of what autograd keeps in Llama blocks of four sizes.
    """
    linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
    inputs = {m.in_features for m in linears}
    if not inputs:
        return 0
    return sum(m.out_features for m in linears) + sum(inputs) + max(inputs) + 2 * min(inputs)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
