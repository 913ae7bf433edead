"""Rules for products, and for operations that look at many entries together."""

from __future__ import annotations

from torch import Tensor

from plait.structure.axes import Dim, dim, hold, join, mix, regroup
from plait.structure.spread import CONSTANT, Call, flat, pointwise, rule

COMPARED = "two results are compared by it"


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
    if not (call.known.is_weight(one) or call.known.is_weight(two)):
        # Switched off where weights read it, a unit would still count here.
        mix(left[-1], COMPARED)
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


@rule("_scaled_dot_product")
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
    mix(q[3], COMPARED)
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
    numbers = [d for d in flat(given) if isinstance(d, int) and not isinstance(d, bool)]
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
