"""How operations carry axes from their inputs to their outputs.

A rule gets the dimensions of the tensors that go in and says those of what comes out, uniting axes
that meet on the way. An operation without a rule holds every axis that it touches: what becomes of
its units cannot be told, so none is taken out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from plait.structure.axes import Axis, Dim, hold, join, leaves

CONSTANT = "it meets something that is no weight"
Dims = list[Dim]
Rule = Callable[["Call"], None]
RULES: dict[str, Rule] = {}


class Call:
    """One operation that has run: its arguments, its outputs, and whose dimensions are known."""

    def __init__(self, known: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        self.known, self.name, self.args, self.kwargs = known, name, args, kwargs
        self.outs = [t for t in flat(out) if isinstance(t, Tensor)]

    def dims(self, value: Any) -> Dims:
        return self.known.dims(value)

    def arg(self, place: int, name: str, default: Any = None) -> Any:
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    @property
    def tensors(self) -> list[Tensor]:
        given = [*self.args, *self.kwargs.values()]
        return [t for t in flat(given) if isinstance(t, Tensor)]

    def gives(self, *dims: Dims) -> None:
        """Dimensions of the outputs; those not named are constants."""
        for out, found in zip(self.outs, dims, strict=False):
            self.known.label(out, found)

    def holds(self, why: str = "") -> None:
        """Give up on every axis that goes in."""
        for tensor in self.tensors:
            for axes in self.dims(tensor):
                hold(axes, why or f"{self.name!r} cannot be followed")


def flat(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [x for item in value for x in flat(item)]
    return [value]


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def spread(func: Any, call: Call) -> None:
    """Label the outputs of an operation."""
    name = "_scaled_dot_product" if "_scaled_dot_product" in call.name else call.name
    if name in RULES:
        RULES[name](call)
    elif name.rstrip("_") in RULES:
        RULES[name.rstrip("_")](call)
    elif torch.Tag.pointwise in func.tags:
        pointwise(call)
    else:
        call.holds()


# -- entry by entry -----------------------------------------------------------------------------


@rule("copy", "lerp", "addcmul", "addcdiv")
def pointwise(call: Call) -> None:
    if not call.outs:
        return
    count = call.outs[0].dim()
    found: Dims = [[] for _ in range(count)]
    for tensor in call.tensors:
        for place, axes in enumerate(reversed(call.dims(tensor)), start=1):
            if not axes or place > count:
                continue
            if found[-place]:
                join(found[-place], axes, call.name)
            else:
                found[-place] = axes
    call.gives(*[found] * len(call.outs))


@rule(
    *("clone", "contiguous", "_to_copy", "detach", "alias", "lift_fresh", "lift_fresh_copy", "to"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
    *("native_dropout", "_assert_async"),
)
def same(call: Call) -> None:
    if call.outs and call.tensors:
        call.gives(*[call.dims(call.tensors[0])] * len(call.outs))
        if call.name == "_to_copy" and call.known.is_weight(call.tensors[0]):
            call.known.copied(call.outs[0])


@rule("arange", "zeros", "ones", "full", "empty", "scalar_tensor", "eye", "empty_strided")
@rule("new_zeros", "new_ones", "new_full", "new_empty", "_local_scalar_dense", "item", "linspace")
def fresh(call: Call) -> None:
    """Nothing of what goes in is in what comes out."""


def touched(dims: Dims) -> list[Axis]:
    """The axes of all dimensions."""
    return [axis for axes in dims for axis in leaves(axes)]
