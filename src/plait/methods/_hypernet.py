"""A small network from a slot's learned embedding to features that all slots' heads read.

    mlp           e [k] ──► gelu(linear) ──► ... ──► features [h]
    transformer   every slot's e is a token ──► post-norm encoder layers ──► this slot's token [k]

Its tensors are an adapter's shared pools. They are read anew at each site: one computation kept for
a whole forward would be freed by the first of several backward passes, and its second half would be
missing where gradient checkpointing runs a block again. The transformer so costs a pass over all
slots at every site, small beside a linear layer on a batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from plait.adapter import SharedTensors

EXPANSION = 4
"""Width of an encoder layer's feed-forward part over its own."""


def shapes(o: Any) -> dict[str, tuple[int, ...]]:
    """The network's tensors; `o` has network, embedding, hidden, depth and heads."""
    found: dict[str, tuple[int, ...]] = {}
    width = o.embedding
    for i in range(o.depth):
        if o.network == "mlp":
            found |= _linear(f"{i}", o.hidden, width)
            width = o.hidden
        else:
            found |= _linear(f"{i}_read", 3 * width, width) | _linear(f"{i}_mix", width, width)
            found |= _linear(f"{i}_wide", EXPANSION * width, width)
            found |= _linear(f"{i}_back", width, EXPANSION * width)
            for norm in ("first", "second"):
                found |= {f"{i}_{norm}_scale": (width,), f"{i}_{norm}_shift": (width,)}
    return found


def _linear(name: str, out: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}_weight": (out, inputs), f"{name}_bias": (out,)}


def width(o: Any) -> int:
    """How many features come out."""
    return o.hidden if o.network == "mlp" and o.depth else o.embedding


def make(shared: SharedTensors, o: Any) -> None:
    """Register the network's tensors: weights as nn.Linear's, norms at one, biases at zero."""
    for name, shape in shapes(o).items():
        shared.pool(name, shape, start="kaiming_uniform" if name.endswith("_weight") else None)
        if name.endswith("_scale"):
            with torch.no_grad():
                shared[name].fill_(1.0)


def features(shared: SharedTensors, o: Any, slot: int) -> Tensor:
    """The features of one slot, [width]."""
    if o.network == "mlp":
        hidden = shared["slots"][slot]
        for i in range(o.depth):
            hidden = F.gelu(_apply(shared, f"{i}", hidden))
        return hidden
    tokens = shared["slots"]
    for i in range(o.depth):
        tokens = _encode(shared, f"{i}", tokens, o.heads)
    return tokens[slot]


def _apply(shared: SharedTensors, name: str, x: Tensor) -> Tensor:
    return F.linear(x, shared[f"{name}_weight"], shared[f"{name}_bias"])


def _encode(shared: SharedTensors, i: str, x: Tensor, heads: int) -> Tensor:
    """One encoder layer on tokens x [slots, k]."""
    q, k, v = (
        part.unflatten(-1, (heads, -1)).transpose(0, 1)
        for part in _apply(shared, f"{i}_read", x).chunk(3, -1)
    )
    seen = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
    x = x + _apply(shared, f"{i}_mix", seen.transpose(0, 1).flatten(1))
    x = F.layer_norm(x, x.shape[-1:], shared[f"{i}_first_scale"], shared[f"{i}_first_shift"])
    x = x + _apply(shared, f"{i}_back", F.relu(_apply(shared, f"{i}_wide", x)))
    return F.layer_norm(x, x.shape[-1:], shared[f"{i}_second_scale"], shared[f"{i}_second_shift"])
