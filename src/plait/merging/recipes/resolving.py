"""From a recipe to tasks: for every tensor of the result its sources, method and parameters."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from plait.errors import PlaitError
from plait.merging.opened import held_as
from plait.merging.recipes.checking import check_names, dialect_of
from plait.merging.recipes.inputs import Inputs
from plait.merging.recipes.layers import comes_first
from plait.merging.recipes.parameters import Parameters
from plait.merging.recipes.references import Reference
from plait.merging.recipes.schema import Body, Recipe
from plait.merging.recipes.stretches import Source, Stretch, stretches_of
from plait.merging.recipes.vocabulary import Vocabulary, is_vocabulary
from plait.merging.shards import Planned
from plait.merging.work import Read, Task


@dataclass
class Resolver:
    """Makes the tasks; `notes` collects what a user should know of them."""

    recipe: Recipe
    inputs: Inputs
    vocabulary: Vocabulary | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dialect = dialect_of(self.recipe)
        self.notes += check_names(self.recipe, self.dialect)

    def tasks(self) -> list[Task]:
        """One for each tensor of the result, in its order."""
        found: dict[str, Task] = {}
        for module, body in self.recipe.bodies().items():
            for task in self._of_body(body, module):
                if task.planned.name in found:
                    raise PlaitError(f"two modules of the recipe make {task.planned.name!r}.")
                found[task.planned.name] = task
        return list(found.values())

    def layers(self) -> list[int] | None:
        """Which layer of its first source each layer of the result is, where slices say so."""
        kept: list[int] = []
        for module, body in self.recipe.bodies().items():
            for stretch in stretches_of(self.recipe, body, module, self.inputs)[0]:
                if stretch.whole:
                    return None
                kept += [stretch.sources[0].first + i for i in range(stretch.count)]
        return kept

    def _of_body(self, body: Body, module: str | None) -> Iterator[Task]:
        stretches, before, after = stretches_of(self.recipe, body, module, self.inputs)
        outside = self._outside(stretches, module)
        for name in filter(comes_first, outside):
            yield self._task(name, before, name, None)
        at: dict[str, int] = defaultdict(int)
        for stretch in stretches:
            for layer in range(stretch.count):
                start = f"{stretch.prefix}.{at[stretch.prefix]}"
                at[stretch.prefix] += 1
                for rest in self._rests(stretch, layer, module):
                    yield self._task(f"{start}.{rest}", stretch, rest, layer)
        for name in outside:
            if not comes_first(name):
                yield self._task(name, after, name, None)

    def _rests(self, stretch: Stretch, layer: int, module: str | None) -> list[str]:
        """What the tensors of a layer are called after its number."""
        pattern = stretch.pattern
        assert pattern.stack is not None
        layout = self.inputs.layout(pattern.reference, module)
        return layout.layer(pattern.stack, pattern.first + layer)

    def _outside(self, stretches: Sequence[Stretch], module: str | None) -> list[str]:
        """Tensors that lie in no stretch; of slices also other stacks, which stay as they are."""
        layout = self.inputs.layout(self.inputs.pattern, module)
        used = {stretch.prefix for stretch in stretches}
        others = [s for s in layout.stacks if s.prefix not in used]
        inner = [
            s.name(i, rest) for s in others for i in range(s.count) for rest in layout.layer(s, i)
        ]
        return [*layout.outside, *inner]

    def _task(self, name: str, stretch: Stretch, here: str, layer: int | None) -> Task:
        """The merge of one tensor; `here` is its name in the sources (in a layer, the rest)."""
        base, sources = self._parts(stretch, layer)
        names = [source.name(here, layer) for source in sources]
        reads = [self._read(s.reference, n) for s, n in zip(sources, names, strict=True)]
        read = None if base is None else self._read(base.reference, base.name(here, layer))
        planned = self._planned(name, [*reads, *([read] if read else [])])
        if not planned.dtype.is_floating_point:
            return Task(planned, ((read or reads[0]),), (1.0,))
        made = self.dialect.make(
            Parameters(
                name,
                names,
                [str(s.reference) for s in sources],
                [s.levels for s in sources],
                stretch.shared,
                stretch.depth(layer),
                len(planned.shape) < 2,
            )
        )
        kept = reads if made.kept is None else [reads[i] for i in made.kept]
        if not kept:
            assert read is not None
            return Task(planned, (read,), (1.0,))
        return Task(planned, tuple(kept), made.weights, made.way, read)

    def _parts(self, stretch: Stretch, layer: int | None) -> tuple[Source | None, list[Source]]:
        """(what changes are taken from, the inputs) of a stretch, as the method wants them."""
        kind = self.dialect.base
        sources = list(stretch.sources)
        given = next((s for s in sources if s.reference == stretch.base), None)
        others = [s for s in sources if s is not given]
        base = given or self._unlisted(stretch)
        if kind in ("required", "optional"):
            if kind == "required" and base is None:
                raise self._needs_base(stretch)
            self._count(len(others))
            return base, others
        if kind == "first":
            if base is None:
                raise self._needs_base(stretch)
            sources = [base, *others]
        elif kind == "input" and given is None and base is not None and self._takes(base, stretch):
            sources = [*sources, base]
        self._count(len(sources))
        return None, sources

    def _unlisted(self, stretch: Stretch) -> Source | None:
        """The base of whole models, where it is not one of those that are listed."""
        if stretch.base is None or not stretch.whole:
            return None
        return dataclasses.replace(stretch.pattern, reference=stretch.base)

    def _takes(self, base: Source, stretch: Stretch) -> bool:
        """Whether a base that is not listed is one more input: if the recipe gives it a weight."""
        return "weight" not in self.dialect.each or any("weight" in lv for lv in stretch.shared)

    def _needs_base(self, stretch: Stretch) -> PlaitError:
        where = "base_model" if stretch.whole else "base_model, and it among each slice's sources"
        return PlaitError(f"{self.recipe.merge_method} needs a {where}.")

    def _count(self, found: int) -> None:
        least, most = self.dialect.least, self.dialect.most
        if found < least or (most is not None and found > most):
            wanted = str(least) if least == most else f"{least} or more"
            wanted = f"at most {most}" if most is not None and found > most > least else wanted
            besides = " besides the base" if self.dialect.base in ("required", "optional") else ""
            name = self.recipe.merge_method or self.recipe.method
            raise PlaitError(f"{name} merges {wanted} models{besides}, not {found}.")

    def _read(self, reference: Reference, name: str) -> Read:
        number = self.inputs.number(reference)
        rows = None
        if self.vocabulary is not None and self._is_vocabulary(reference, name):
            rows = self.vocabulary.maps.get(number)
        return Read(number, name, rows)

    def _is_vocabulary(self, reference: Reference, name: str) -> bool:
        checkpoint = self.inputs.checkpoint(reference)
        return is_vocabulary(name, checkpoint)

    def _planned(self, name: str, reads: Sequence[Read]) -> Planned:
        shape: tuple[int, ...] | None = None
        dtype: torch.dtype | None = None
        for read in reads:
            checkpoint = self.inputs.checkpoints[self.inputs.models[read.model].path]
            held = held_as(checkpoint, read.name)
            if held is None:
                continue  # the check of the tasks says so
            entry = checkpoint.entries[held]
            if shape is None:
                shape = entry.shape
                if self.vocabulary is not None and is_vocabulary(read.name, checkpoint):
                    shape = (self.vocabulary.size, *shape[1:])
            dtype = entry.dtype if dtype is None else torch.promote_types(dtype, entry.dtype)
        if shape is None or dtype is None:
            raise PlaitError(f"no input has a tensor for {name!r} of the result.")
        wanted = self.recipe.out_dtype or self.recipe.dtype
        if wanted is not None and dtype.is_floating_point:
            dtype = getattr(torch, wanted)
        return Planned(name, shape, dtype)
