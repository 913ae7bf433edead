"""Writing the active adapters into the base weights, and taking them out again bit for bit."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from plait.adapter.activation import entries_by_module, set_active
from plait.adapter.delta import Delta
from plait.adapter.state import get_state
from plait.adapter.weighting import Weight, is_number, weighted_bias, weighted_dense
from plait.errors import PlaitError


def fuse(model: nn.Module, *, keep_base: bool = True) -> None:
    """Fold the active adapters into W (and the bias); their forward cost is then zero.

    The old parameters are kept aside (one copy of the touched weights) so that `unfuse` is an
    exchange of pointers and exact; `keep_base=False` saves that memory and cannot be undone. A
    fused weight is a new parameter, so a tied one (embedding and head) is untied at the fused
    module only. A sparse change is written into W itself, and only what it overwrites is kept.

    Raises PlaitError when an active delta is not linear in its input, or the base is quantised.
    """
    state = get_state(model)
    if state.fused is not None:
        raise PlaitError("adapters are already fused; plait.unfuse(model) first.")
    plans = entries_by_module(state)
    for _, entries in plans:
        for delta, _ in entries:
            _check_fusable(delta)
    record: dict[str, Any] = {"old": [], "overwritten": [], "kept": keep_base}
    uses: Counter[int] = Counter()
    if any(delta.sparse() is not None for _, entries in plans for delta, _ in entries):
        uses.update(id(p) for m in model.modules() for p in m._parameters.values())
    with torch.no_grad():
        for module, entries in plans:
            if _written_in_place(entries, uses):
                record["overwritten"] += [_write(*entry) for entry in entries]
                module.__dict__["_plait_plan"] = None
                continue
            for name, value in _fused_values(entries).items():
                record["old"].append((module, name, module._parameters.get(name)))
                module.register_parameter(name, nn.Parameter(value, requires_grad=False))
            module.__dict__["_plait_plan"] = None
    if not keep_base:
        record["old"], record["overwritten"] = [], []
    state.fused = record


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`: the very same base parameters are put back."""
    state = get_state(model)
    if state.fused is None:
        raise PlaitError("nothing is fused.")
    if not state.fused["kept"]:
        raise PlaitError(
            "fused with keep_base=False: the base weights are gone; reload the base model."
        )
    for module, name, old in state.fused["old"]:
        module._parameters[name] = old
    with torch.no_grad():
        for flat, positions, values in reversed(state.fused["overwritten"]):
            flat.index_copy_(0, positions, values)
    state.fused = None
    set_active(model, state.active)


def _check_fusable(delta: Delta) -> None:
    path = delta.site.path
    if not delta.traits.linear_in_x:
        raise PlaitError(
            f"the delta at {path!r} ({type(delta).__name__}) is not linear in its input and "
            "cannot be fused; keep it attached."
        )
    if delta.traits.edits_base:
        raise PlaitError(
            f"the delta at {path!r} already lives in the weights; there is nothing to fuse."
        )
    weight = delta.site.weight()
    if not weight.is_floating_point():
        raise PlaitError(f"the base at {path!r} is quantised; dequantise it before fusing.")
    if hasattr(weight, "full_tensor"):
        raise PlaitError(f"the weight at {path!r} is sharded; gather the model before fusing.")


def _written_in_place(entries: list[tuple[Delta, Weight]], uses: Counter[int]) -> bool:
    """All changes are sparse, and W is one parameter of this module alone, stored as it is."""
    if any(d.sparse() is None or d.bias() is not None or not is_number(w) for d, w in entries):
        return False
    site = entries[0][0].site
    own = getattr(site.base, "weight", None)
    alone = isinstance(own, nn.Parameter) and uses[id(own)] == 1
    return alone and site.weight().is_contiguous()


def _write(delta: Delta, scale: Weight) -> tuple[Tensor, Tensor, Tensor]:
    """Add one sparse change to W; returns W's flat view, the positions and what stood there."""
    found = delta.sparse()
    assert found is not None
    flat, positions = delta.site.weight().detach().view(-1), found[0].long()
    old = flat.index_select(0, positions)  # several times faster than indexing
    wide = torch.promote_types(old.dtype, torch.float32)
    flat.index_copy_(0, positions, (old.to(wide) + scale * found[1].to(wide)).to(old.dtype))
    return flat, positions, old


def _fused_values(entries: list[tuple[Delta, Weight]]) -> dict[str, Tensor]:
    """{parameter name: base + change} of one module."""
    values: dict[str, Tensor] = {}
    outputs = [(d, w) for d, w in entries if d.site.kind != "parameter"]
    for delta, weight in entries:
        if delta.site.kind == "parameter":
            name = delta.site.path.rpartition(".")[2]
            old = values.get(name, delta.site.weight())
            values[name] = old + weighted_dense(delta, weight).to(old.dtype)
    if outputs:
        site = outputs[0][0].site
        values["weight"] = site.replacement(_plus_changes(site.weight(), outputs))
        changes = [(w, b) for d, w in outputs if (b := d.bias()) is not None]
        if changes:
            old_bias = values.get("bias", site.bias())
            total = torch.stack([weighted_bias(b, w) for w, b in changes]).sum(0)
            total = total.to(site.weight().dtype)
            values["bias"] = total if old_bias is None else old_bias + total.to(old_bias.dtype)
    return values


def _plus_changes(weight: Tensor, entries: list[tuple[Delta, Weight]]) -> Tensor:
    """W + sum of w dW, rounded to W's dtype once."""
    dtype = weight.dtype
    total = weight.to(torch.promote_types(dtype, torch.float32))
    for delta, scale in entries:
        low = delta.factors()
        if low is not None and not isinstance(scale, Tensor):
            B, A = low.B.to(total.dtype), low.A.to(total.dtype)
            total = torch.addmm(total, B, A, alpha=low.scale * scale)
        else:
            total = total + weighted_dense(delta, scale).to(total.dtype)
    return total.to(dtype)
