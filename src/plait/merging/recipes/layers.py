"""The layers of a model, by its tensors' names: where they stand, and configs of other numbers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from plait.errors import PlaitError, unknown
from plait.merging.checkpoints import Checkpoint

COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth")
"""What configs call the number of layers."""
FIRST = re.compile(r"embed|wte|wpe|emb\.")
"""Tensors outside of the layers that come before them; all others come after."""
_NUMBERED = re.compile(r"(.*?)\.(\d+)\.(.+)")
PARTS = {"text_decoder": ("language_model", "text_model"), "default": ()}
"""Names of modules that stand for others in checkpoints; `default` is the whole."""


@dataclass(frozen=True)
class Stack:
    """Numbered layers under one prefix: `prefix.3.rest`."""

    prefix: str
    count: int

    def name(self, layer: int, rest: str) -> str:
        return f"{self.prefix}.{layer}.{rest}"


@dataclass(frozen=True)
class Layout:
    """What a checkpoint's tensors are: in the layers, in other stacks, or outside."""

    checkpoint: Checkpoint
    module: str | None = None

    @cached_property
    def names(self) -> list[str]:
        """The tensors of the module, in the file's order."""
        every = list(self.checkpoint.entries)
        return every if self.module is None else names_of_module(self.module, every)

    @cached_property
    def stacks(self) -> list[Stack]:
        """All stacks of layers, the one that the config counts first."""
        found: dict[str, set[int]] = defaultdict(set)
        sizes: dict[str, int] = defaultdict(int)
        for name in self.names:
            if match := _NUMBERED.fullmatch(name):
                found[match[1]].add(int(match[2]))
                sizes[match[1]] += 1
        counted = layer_count(self.checkpoint.config)

        def order(prefix: str) -> tuple[bool, int]:
            return len(found[prefix]) != counted, -sizes[prefix]

        whole = {p: at for p, at in found.items() if at == set(range(len(at)))}
        return [Stack(p, len(found[p])) for p in sorted(whole, key=order)]

    @cached_property
    def main(self) -> Stack:
        if not self.stacks:
            raise PlaitError(f"{self.checkpoint.path} has no numbered layers to take slices of.")
        return self.stacks[0]

    def layer(self, stack: Stack, index: int) -> list[str]:
        """What the tensors of one layer are called after its number."""
        start = stack.name(index, "")
        return [name.removeprefix(start) for name in self.names if name.startswith(start)]

    @cached_property
    def outside(self) -> list[str]:
        """Tensors in no stack."""
        starts = tuple(f"{stack.prefix}." for stack in self.stacks)

        def numbered(name: str) -> bool:
            match = _NUMBERED.fullmatch(name)
            return match is not None and name.startswith(starts) and f"{match[1]}." in starts

        return [name for name in self.names if not (starts and numbered(name))]


def comes_first(name: str) -> bool:
    """Whether a tensor outside of the layers is read before them."""
    return FIRST.search(name) is not None


def layer_count(config: Mapping[str, Any]) -> int | None:
    """How many layers a config says that its (language) model has."""
    for part in (config, config.get("text_config"), config.get("llm_config")):
        found = part if isinstance(part, Mapping) else {}
        for key in COUNTS:
            if isinstance(found.get(key), int):
                return int(found[key])
    return None


def names_of_module(module: str, names: Iterable[str]) -> list[str]:
    """The tensors of one module of several: those with its name as a part of theirs."""
    every = list(names)
    if module == "default":
        return every
    wanted = {module, *PARTS.get(module, ())}
    found = [name for name in every if wanted & set(name.split("."))]
    if not found:
        parts = {part for name in every for part in name.split(".")[:2] if not part.isdigit()}
        raise unknown("module", module, parts, where="the model's tensors")
    return found


def with_layers(config: Mapping[str, Any], kept: list[int]) -> dict[str, Any]:
    """A config of as many layers as were kept, with lists of one entry a layer in their order."""
    made = dict(config)
    for name in ("text_config", "llm_config"):
        if isinstance(made.get(name), Mapping):
            made[name] = with_layers(made[name], kept)
    old = next((made[key] for key in COUNTS if isinstance(made.get(key), int)), None)
    if old is None:
        return made
    for key in COUNTS:
        if isinstance(made.get(key), int):
            made[key] = len(kept)
    for key, value in made.items():
        if isinstance(value, list) and len(value) == old and max(kept) < old:
            made[key] = [value[i] for i in kept]
    return made
