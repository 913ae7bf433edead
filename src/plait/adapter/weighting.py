"""What a weight on a change may be, and how it acts without a merge.

    w            a number                  w dW
    w [out, 1]   one for each row          diag(w) dW     the change's outputs (its bias too)
    w [1, in]    one for each column       dW diag(w)     the change's inputs

A weight multiplies dW by broadcasting, and may be a tensor with a gradient. Of a low-rank change
rows scale B and columns scale A, so that nothing of W's size is formed; any other change has its
output or its input scaled.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from plait.adapter.delta import Delta
from plait.errors import PlaitError
from plait.linalg import LowRank

Weight = float | Tensor


def is_number(weight: Any) -> bool:
    """Whether it is one number for the whole change."""
    return not isinstance(weight, Tensor) or weight.numel() == 1


def check_weight(delta: Delta, weight: Weight) -> None:
    """PlaitError for a tensor that is neither rows nor columns of this change."""
    if is_number(weight):
        return
    assert isinstance(weight, Tensor)
    site = delta.site
    rows, columns = site.shape[-2:] if len(site.shape) == 2 else (0, 0)
    if weight.shape == (rows, 1):
        return
    if weight.shape != (1, columns):
        raise PlaitError(
            f"the weight at {site.path!r} is {list(weight.shape)}; give a number, [{rows}, 1] for "
            f"rows or [1, {columns}] for columns."
        )
    if site.kind not in ("linear", "parameter") or not delta.traits.linear_in_x:
        raise PlaitError(
            f"the change at {site.path!r} ({site.kind}, {type(delta).__name__}) takes no weights "
            "by column; give a number or rows."
        )
    if delta.traits.changes_bias and delta.bias() is not None:
        raise PlaitError(
            f"the change at {site.path!r} has a bias, which has no columns; give a number or rows."
        )


def weighted_factors(low: LowRank, weight: Weight) -> LowRank:
    """The weighted change of a low-rank one."""
    if not isinstance(weight, Tensor):
        return LowRank(low.B, low.A, low.scale * weight)
    if _by_column(weight):
        return LowRank(low.B, low.A * weight.to(low.A.dtype), low.scale)
    rows = _one(weight) if is_number(weight) else weight.to(low.B.dtype)
    return LowRank(low.B * rows, low.A, low.scale)


def weighted_change(delta: Delta, weight: Weight, x: Tensor, y: Tensor) -> Tensor:
    """The weighted change of the site's output, for input `x` and base output `y`."""
    if _by_column(weight):
        assert isinstance(weight, Tensor)
        if delta.traits.reads_output:  # y is not the output of scaled inputs
            return delta.site.apply(x, weighted_dense(delta, weight).to(x.dtype))
        return delta(x * weight[0].to(x.dtype), y)
    if is_number(weight):
        return _one(weight) * delta(x, y)
    assert isinstance(weight, Tensor)
    change = delta(x, y)
    spread = (-1, *[1] * (change.dim() - 2)) if delta.site.kind == "conv" else (-1,)
    return weight.reshape(spread).to(change.dtype) * change


def weighted_dense(delta: Delta, weight: Weight) -> Tensor:
    """The weighted dW in canonical orientation."""
    dense = delta.dense()
    return dense * (_one(weight) if is_number(weight) else weight.to(dense.dtype))  # type: ignore[union-attr]


def weighted_bias(bias: Tensor, weight: Weight) -> Tensor:
    """The weighted change of the bias [out]."""
    if is_number(weight):
        return _one(weight) * bias
    return weight[:, 0].to(bias.dtype) * bias  # type: ignore[index]


def _by_column(weight: Weight) -> bool:
    return not is_number(weight) and weight.shape[0] == 1  # type: ignore[union-attr]


def _one(weight: Weight) -> Weight:
    """A tensor of one number loses its axes, which would otherwise turn up in the result."""
    return weight.reshape(()) if isinstance(weight, Tensor) and weight.numel() == 1 else weight
