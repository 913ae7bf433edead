"""How operations carry axes from their inputs to their outputs.

A rule gets the dimensions of the tensors that go in and says those of what comes out, uniting axes
that meet on the way. An operation without a rule holds every axis that it touches: what becomes of
its units cannot be told, so none is taken out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from plait.structure.axes import Axis, Dim, dim, hold, join, leaves, mix, regroup

CONSTANT = "it meets something that is no weight"
Dims = list[Dim]
Rule = Callable[["Call"], None]
RULES: dict[str, Rule] = {}


class Call:
    """One operation that has run: its arguments, its outputs, and whose dimensions are known."""

    def __init__(self, known: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        self.known, self.name, self.args, self.kwargs = known, name, args, kwargs
        self.outs = [t for t in _flat(out) if isinstance(t, Tensor)]

    def dims(self, value: Any) -> Dims:
        return self.known.dims(value)

    def arg(self, place: int, name: str, default: Any = None) -> Any:
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    @property
    def tensors(self) -> list[Tensor]:
        given = [*self.args, *self.kwargs.values()]
        return [t for t in _flat(given) if isinstance(t, Tensor)]

    def gives(self, *dims: Dims) -> None:
        """Dimensions of the outputs; those not named are constants."""
        for out, found in zip(self.outs, dims, strict=False):
            self.known.label(out, found)

    def holds(self, why: str = "") -> None:
        """Give up on every axis that goes in."""
        for tensor in self.tensors:
            for axes in self.dims(tensor):
                hold(axes, why or f"{self.name!r} cannot be followed")


def _flat(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [x for item in value for x in _flat(item)]
    return [value]


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def spread(func: Any, call: Call) -> None:
    """Label the outputs of an operation."""
    name = call.name
    if name.startswith("_scaled_dot_product"):
        attention(call)
    elif name in RULES:
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


@rule("arange", "zeros", "ones", "full", "empty", "scalar_tensor", "eye", "empty_strided")
@rule("new_zeros", "new_ones", "new_full", "new_empty", "_local_scalar_dense", "item", "linspace")
def fresh(call: Call) -> None:
    """Nothing of what goes in is in what comes out."""


# -- the same numbers in another shape ----------------------------------------------------------


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
    wanted = [d % max(len(shape), 1) for d in _flat(wanted)]
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


# -- sums and products --------------------------------------------------------------------------


@rule("mm", "bmm", "mv", "dot")
def product(call: Call) -> None:
    _product(call, call.args[0], call.args[1])


@rule("addmm", "baddbmm", "addmv")
def added_product(call: Call) -> None:
    bias = call.dims(call.args[0])
    _product(call, call.args[1], call.args[2])
    out = call.dims(call.outs[0])
    for mine, theirs in zip(reversed(out), reversed(bias), strict=False):
        if theirs:
            join(mine, theirs, call.name)


def _product(call: Call, one: Tensor, two: Tensor) -> None:
    left, right = call.dims(one), call.dims(two)
    join(left[-1], right[-2 if len(right) > 1 else -1], call.name)
    for a, b in zip(left[:-2], right[:-2], strict=False):
        join(a, b, call.name)
    call.gives([*left[:-1], *(right[-1:] if len(right) > 1 else [])])


@rule("linear")
def linear(call: Call) -> None:
    x, weight = call.dims(call.args[0]), call.dims(call.args[1])
    join(x[-1], weight[-1], call.name)
    bias = call.arg(2, "bias")
    if bias is not None:
        join(weight[0], call.dims(bias)[0], call.name)
    call.gives([*x[:-1], weight[0]])


@rule("convolution", "_convolution")
def convolution(call: Call) -> None:
    x, weight = call.dims(call.args[0]), call.dims(call.args[1])
    transposed, groups = call.args[6], call.args[8]
    if transposed or groups != 1 or len(x) != len(weight):
        call.holds("a grouped or transposed convolution reads or writes it")
        return
    join(x[1], weight[1], call.name)
    if call.args[2] is not None:
        join(weight[0], call.dims(call.args[2])[0], call.name)
    call.gives([x[0], weight[0], *(dim(n, CONSTANT) for n in call.outs[0].shape[2:])])


def attention(call: Call) -> None:
    """[..., heads, tokens, width]; key-value heads may be fewer, each read by several queries."""
    q, k, v = (call.dims(t) for t in call.args[:3])
    if len(q) != 4:
        call.holds()
        return
    queries, keys = call.args[0].shape[1], call.args[1].shape[1]
    if queries == keys:
        heads: list[Dim] | None = [q[1]]
    else:
        heads = regroup(q[1], [keys, queries // keys]) if queries % keys == 0 else None
    if heads is None:
        call.holds("attention shares its heads unevenly")
        return
    join(heads[0], k[1], call.name)
    join(heads[0], v[1], call.name)
    join(q[3], k[3], call.name)
    call.gives([q[0], q[1], q[2], v[3]])


# -- what looks at many entries together --------------------------------------------------------


@rule(
    *("mean", "sum", "amax", "amin", "max", "min", "var", "var_mean", "std", "std_mean", "prod"),
    *("norm", "linalg_vector_norm", "any", "all", "logsumexp", "argmax", "argmin", "nansum"),
)
def reduction(call: Call) -> None:
    before = call.dims(call.args[0])
    place = 2 if call.name in ("norm", "linalg_vector_norm") else 1
    given = call.arg(place, "dim")
    if isinstance(given, Tensor):  # torch.max(a, b)
        pointwise(call)
        return
    everything = list(range(len(before)))
    numbers = [d for d in _flat(given) if isinstance(d, int) and not isinstance(d, bool)]
    reduced = [d % max(len(before), 1) for d in numbers] or everything
    for d in reduced:
        mix(before[d], f"{call.name!r} runs over it")
    kept = call.outs[0].dim() == len(before)
    left = [[] if i in reduced else axes for i, axes in enumerate(before)]
    call.gives(
        *[left if kept else [a for i, a in enumerate(left) if i not in reduced]] * len(call.outs)
    )


@rule("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax")
def softmax(call: Call) -> None:
    before = call.dims(call.args[0])
    mix(before[call.arg(1, "dim")], "a softmax runs over it")
    call.gives(before)


@rule("cumsum", "cumprod", "flip", "roll", "sort", "tril", "triu")
def along(call: Call) -> None:
    before = call.dims(call.args[0])
    for axes in before:
        hold(axes, f"{call.name!r} gives its order a meaning")
    call.gives(*[before] * len(call.outs))


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm", "_fused_rms_norm_composite")
def norm(call: Call) -> None:
    x, shape = call.dims(call.args[0]), call.args[1]
    for weight in (call.arg(2, "weight"), call.arg(3, "bias")):
        if isinstance(weight, Tensor):
            for mine, theirs in zip(x[-len(shape) :], call.dims(weight), strict=True):
                join(mine, theirs, call.name)
    for axes in x[-len(shape) :]:
        mix(axes, "a norm runs over it")
    call.gives(x)


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "batch_norm")
def batch_norm(call: Call) -> None:
    x = call.dims(call.args[0])
    for tensor in call.args[1:5]:
        if isinstance(tensor, Tensor):
            join(x[1], call.dims(tensor)[0], call.name)
    call.gives(x)


@rule("native_group_norm")
def group_norm(call: Call) -> None:
    x = call.dims(call.args[0])
    hold(x[1], "a group norm counts its groups")
    call.gives(x)


@rule("max_pool2d_with_indices", "max_pool2d", "avg_pool2d", "_adaptive_avg_pool2d", "avg_pool1d")
@rule("adaptive_avg_pool1d", "adaptive_max_pool2d", "upsample_nearest2d", "max_pool1d")
def pool(call: Call) -> None:
    x = call.dims(call.args[0])
    rest = len(x) - 2
    call.gives(*[[*x[:2], *(dim(n, CONSTANT) for n in o.shape[-rest:])] for o in call.outs])


@rule("constant_pad_nd")
def pad(call: Call) -> None:
    x, out = call.dims(call.args[0]), call.outs[0]
    found = []
    for was, now, axes in zip(call.args[0].shape, out.shape, x, strict=True):
        if was != now:
            hold(axes, "it is padded")
        found.append(axes if was == now else dim(now, "it is padded"))
    call.gives(found)


def touched(dims: Dims) -> list[Axis]:
    """The axes of all dimensions."""
    return [axis for axes in dims for axis in leaves(axes)]
