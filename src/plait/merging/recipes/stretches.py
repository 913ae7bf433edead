"""A recipe's models or slices as stretches of layers: which layers of which inputs meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plait.errors import PlaitError
from plait.merging.recipes.inputs import Inputs
from plait.merging.recipes.layers import Stack
from plait.merging.recipes.parameters import Levels
from plait.merging.recipes.references import Reference
from plait.merging.recipes.schema import Body, Entry, Recipe, Slice
from plait.merging.recipes.values import Setting


@dataclass(frozen=True)
class Source:
    """An input of a stretch: its layers from `first` on in its own stack."""

    reference: Reference
    stack: Stack | None
    first: int
    levels: Levels

    def name(self, name: str, layer: int | None) -> str:
        """What the tensor is called here: outside of the layers `name`, in one its rest."""
        if layer is None or self.stack is None:
            return name
        return self.stack.name(self.first + layer, name)


@dataclass(frozen=True)
class Stretch:
    """Layers of the result, under `prefix`: `count` of each source, merged one by one.

    What a layer holds is read off `pattern`. `whole`: the sources are whole models, so that a base
    need not be listed among them.
    """

    sources: Sequence[Source]
    base: Reference | None
    count: int
    shared: Levels
    prefix: str
    pattern: Source
    whole: bool

    def depth(self, layer: int | None) -> float:
        """0 at the first layer, 1 at the last (and at an only one), 0 outside of the layers."""
        if layer is None:
            return 0.0
        return layer / (self.count - 1) if self.count > 1 else 1.0


def stretches_of(
    recipe: Recipe, body: Body, module: str | None, inputs: Inputs
) -> tuple[list[Stretch], Stretch, Stretch]:
    """The stretches in the result's order, and those whose sources give what lies before and after
    the layers."""
    common = [recipe.parameters] if body is recipe else [body.parameters, recipe.parameters]
    if body.models is not None:
        like = recipe.base_model or body.models[0].model
        stacks = inputs.layout(like, module).stacks
        made = [_whole(recipe, body.models, module, inputs, common, stack) for stack in stacks]
        outer = _whole(recipe, body.models, module, inputs, common, None)
        return made, outer, outer
    assert body.slices is not None
    made = [_sliced(recipe, piece, module, inputs, common) for piece in body.slices]
    return made, made[0], made[-1]


def _of_model(recipe: Recipe, reference: Reference) -> Mapping[str, Setting]:
    return recipe.input_model_parameters.get(str(reference), {})


def _whole(
    recipe: Recipe,
    models: Sequence[Entry],
    module: str | None,
    inputs: Inputs,
    common: Levels,
    stack: Stack | None,
) -> Stretch:
    """All layers of a stack; without one, what lies outside of the layers."""
    count = 0 if stack is None else stack.count
    sources = []
    for entry in models:
        there = _stack_like(entry.model, stack, module, inputs)
        if there is not None and there.count != count:
            raise PlaitError(
                f"{entry.model} has {there.count} layers, and {recipe.references()[0]} {count}; "
                "merge models of one depth, or name layer ranges in slices."
            )
        levels = [entry.parameters, _of_model(recipe, entry.model), *common]
        sources.append(Source(entry.model, there, 0, levels))
    pattern = Source(recipe.base_model or models[0].model, stack, 0, common)
    prefix = "" if stack is None else stack.prefix
    return Stretch(sources, recipe.base_model, count, common, prefix, pattern, True)


def _stack_like(
    reference: Reference, stack: Stack | None, module: str | None, inputs: Inputs
) -> Stack | None:
    """The stack of that prefix in another model, or else its main one."""
    if stack is None:
        return None
    layout = inputs.layout(reference, module)
    return next((s for s in layout.stacks if s.prefix == stack.prefix), layout.main)


def _sliced(
    recipe: Recipe, piece: Slice, module: str | None, inputs: Inputs, common: Levels
) -> Stretch:
    shared = [piece.parameters, *common]
    sources, counts = [], []
    for source in piece.sources:
        stack = inputs.layout(source.model, module).main
        first, past = source.layer_range or (0, stack.count)
        if past > stack.count:
            raise PlaitError(
                f"layer_range [{first}, {past}] of {source.model}: it has {stack.count} layers."
            )
        levels = [source.parameters, piece.parameters, _of_model(recipe, source.model), *common]
        sources.append(Source(source.model, stack, first, levels))
        counts.append(past - first)
    if len(set(counts)) > 1:
        ranges = ", ".join(f"{s.model} {n}" for s, n in zip(piece.sources, counts, strict=True))
        raise PlaitError(f"the sources of a slice give different numbers of layers ({ranges}).")
    base = piece.base_model or recipe.base_model
    prefix = inputs.layout(inputs.pattern, module).main.prefix
    return Stretch(sources, base, counts[0], shared, prefix, sources[0], False)
