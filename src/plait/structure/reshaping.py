"""Rules for operations that give the same numbers another shape, or take pieces of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from plait.structure.axes import Dim, dim, hold, join, regroup
from plait.structure.spread import Call, flat, rule


@rule("view", "_unsafe_view", "reshape", "_reshape_alias")
def view(call: Call) -> None:
    before, out = call.dims(call.args[0]), call.outs[0]
    found = None if 0 in out.shape else regroup([a for axes in before for a in axes], out.shape)
    if found is None:
        call.holds(f"a view to {list(out.shape)} cuts across it")
    else:
        call.gives(found)


@rule("t", "transpose", "permute", "numpy_T", "swapaxes")
def permute(call: Call) -> None:
    before = call.dims(call.args[0])
    order = list(range(len(before)))
    if call.name.startswith("permute"):
        order = [d % len(before) for d in call.arg(1, "dims")]
    elif len(before) > 1:
        first, second = (0, 1) if call.name == "t" else (call.args[1], call.args[2])
        order[first], order[second] = order[second], order[first]
    call.gives([before[i] for i in order])


@rule("unsqueeze")
def unsqueeze(call: Call) -> None:
    found = list(call.dims(call.args[0]))
    place = call.arg(1, "dim")
    found.insert(place % (len(found) + 1), [])
    call.gives(found)


@rule("squeeze")
def squeeze(call: Call) -> None:
    shape = call.args[0].shape
    wanted = call.arg(1, "dim", list(range(len(shape))))
    wanted = [d % max(len(shape), 1) for d in flat(wanted)]
    before = call.dims(call.args[0])
    call.gives([a for i, a in enumerate(before) if not (i in wanted and shape[i] == 1)])


@rule("expand")
def expand(call: Call) -> None:
    before, out = call.dims(call.args[0]), call.outs[0]
    shape = (*[1] * (out.dim() - len(before)), *call.args[0].shape)
    before = [*[[] for _ in range(out.dim() - len(before))], *before]
    pairs = zip(shape, out.shape, before, strict=True)
    call.gives([axes if was == now else dim(now) for was, now, axes in pairs])


@rule("repeat")
def repeat(call: Call) -> None:
    times = list(call.arg(1, "repeats"))
    before = call.dims(call.args[0])
    before = [*[[] for _ in range(len(times) - len(before))], *before]
    call.gives([[*dim(n), *axes] for n, axes in zip(times, before, strict=True)])


# -- pieces -------------------------------------------------------------------------------------


def _piece(axes: Dim, whole: int, start: int, length: int, name: str) -> Dim:
    """`length` entries of a dimension: one of equal pieces, or nothing that can be followed."""
    if length == whole:
        return axes
    fits = length and whole % length == 0 and start % length == 0
    cut = regroup(axes, [whole // length, length]) if fits else None
    if cut is None:
        hold(axes, f"{name!r} takes a part of it")
        return dim(length, f"{name!r} takes a part of it")
    hold(cut[0], f"{name!r} counts its pieces")
    return cut[1]


def _pieces(call: Call, place: int, starts: Sequence[int]) -> None:
    before, shape = call.dims(call.args[0]), call.args[0].shape
    place %= len(before)
    for out, start in zip(call.outs, starts, strict=True):
        here = list(before)
        here[place] = _piece(before[place], shape[place], start, out.shape[place], call.name)
        call.known.label(out, here)


@rule("slice")
def part(call: Call) -> None:
    place, step = call.arg(1, "dim", 0), call.arg(4, "step", 1)
    start, whole = call.arg(2, "start", 0) or 0, call.args[0].shape[place]
    start = max(0, start + whole) if start < 0 else min(start, whole)
    if step != 1:
        call.holds("a slice skips entries of it")
        return
    _pieces(call, place, [start])


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "tensor_split")
@rule("split_copy", "split_with_sizes_copy", "unsafe_split_with_sizes")
def split(call: Call) -> None:
    place = call.arg(2, "dim", 0)
    starts, at = [], 0
    for out in call.outs:
        starts.append(at)
        at += out.shape[place]
    _pieces(call, place, starts)


@rule("select", "unbind")
def select(call: Call) -> None:
    before = list(call.dims(call.args[0]))
    place = call.arg(1, "dim", 0) % max(len(before), 1)
    hold(before.pop(place), f"{call.name!r} picks entries of it")
    call.gives(*[before] * len(call.outs))


@rule("cat")
def cat(call: Call) -> None:
    given = [t for t in call.args[0] if t.numel()]
    place = call.arg(1, "dim", 0) % call.outs[0].dim()
    if not given:
        return
    first = [list(axes) for axes in call.dims(given[0])]
    alike = len({t.shape[place] for t in given}) == 1
    for tensor in given[1:]:
        for i, axes in enumerate(call.dims(tensor)):
            if i != place or alike:
                join(first[i], axes, call.name)
            else:
                hold(axes, "a concatenation joins parts of other sizes to it")
    if len(given) > 1 and alike:
        first[place] = [*dim(len(given), "a concatenation counts its parts"), *first[place]]
    elif len(given) > 1:
        hold(first[place], "a concatenation joins parts of other sizes to it")
        first[place] = dim(call.outs[0].shape[place], "a concatenation of parts of other sizes")
    call.gives(first)


@rule("stack")
def stack(call: Call) -> None:
    given = call.args[0]
    first = [list(axes) for axes in call.dims(given[0])]
    for tensor in given[1:]:
        for mine, theirs in zip(first, call.dims(tensor), strict=True):
            join(mine, theirs, call.name)
    place = call.arg(1, "dim", 0) % (len(first) + 1)
    first.insert(place, dim(len(given), "a stack counts its parts"))
    call.gives(first)


@rule("embedding")
def embedding(call: Call) -> None:
    table, indices = call.dims(call.args[0]), call.dims(call.args[1])
    hold(table[0], "it is looked up by index")
    call.gives([*indices, *table[1:]])


@rule("index", "index_select")
def index(call: Call) -> None:
    before = call.dims(call.args[0])
    given = call.args[1] if call.name == "index" else [None] * call.args[1] + [call.args[2]]
    chosen = [i for i, t in enumerate(given) if t is not None]
    if len(chosen) != 1 or given[chosen[0]].dtype == torch.bool:
        call.holds("it is picked from by an index")
        return
    place = chosen[0] % len(before)
    hold(before[place], "it is picked from by an index")
    picked = call.dims(given[chosen[0]])
    call.gives([*before[:place], *picked, *before[place + 1 :]])
