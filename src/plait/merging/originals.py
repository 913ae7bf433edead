"""The base's own weights, site by site, for merges that read them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from plait.adapter import Adapter, Site
from plait.adapter.activation import base_weights, refuse_fused
from plait.adapter.state import find_state
from plait.errors import PlaitError
from plait.merging.checkpoints import Checkpoint

Base = nn.Module | str | os.PathLike[str]
Original = tuple[Tensor, Tensor]
"""W0 [out, in], canonical, and the bias as one row [1, out] (0 where the base has none)."""


@contextmanager
def open_originals(
    method: str, base: Base | None, adapters: Sequence[Adapter]
) -> Iterator[Callable[[Site], Original]]:
    """What the base holds at a site: of a model, of a checkpoint's files (read site by site), or,
    without either, of the models that the adapters are attached to.

    Raises PlaitError where nobody knows a site's weight, where it has another shape, and for a
    model whose adapters are fused into its weights.
    """
    with ExitStack() as stack:
        if base is None:
            find = _of_adapters(method, adapters)
            models = [a.model for a in adapters if a.model is not None]
        elif isinstance(base, nn.Module):
            find, models = _of_model(base), [base]
        else:
            find, models = _of_files(stack.enter_context(Checkpoint(base))), []
        for model in {id(m): m for m in models}.values():
            if (state := find_state(model)) is not None:
                refuse_fused(state, "merge")
            stack.enter_context(base_weights(model))
        yield lambda site: _read(site, find(site))


def _read(site: Site, module: nn.Module) -> Original:
    there = type(site)(site.path, site.shape, module, dict(site.details))
    weight, bias = there.weight().detach(), there.bias()
    if weight.shape != torch.Size(site.shape):
        raise PlaitError(
            f"the base's weight at {site.path!r} is {list(weight.shape)}, but the adapters change "
            f"{list(site.shape)}; give the model that they were trained on."
        )
    row = weight.new_zeros(site.shape[-2]) if bias is None else bias.detach()
    return weight, row[None]


def _of_adapters(method: str, adapters: Sequence[Adapter]) -> Callable[[Site], nn.Module]:
    def find(site: Site) -> nn.Module:
        for adapter in adapters:
            if site.path in adapter.deltas and adapter.deltas[site.path].site.module is not None:
                return adapter.deltas[site.path].site.base
        raise PlaitError(
            f"merge method {method!r} reads the base's weight at {site.path!r}; pass "
            "merge(..., base=model or folder), or attach the adapters first."
        )

    return find


def _of_model(model: nn.Module) -> Callable[[Site], nn.Module]:
    def find(site: Site) -> nn.Module:
        path = site.path.rpartition(".")[0] if site.kind == "parameter" else site.path
        try:
            return model.get_submodule(path)
        except AttributeError:
            raise PlaitError(
                f"the base {type(model).__name__} has no module {path!r}, which the adapters "
                "change; give the model that they were trained on."
            ) from None

    return find


def _of_files(checkpoint: Checkpoint) -> Callable[[Site], nn.Module]:
    """Modules that hold one site's tensors and nothing else, so that the site can read them."""

    def find(site: Site) -> nn.Module:
        holder = nn.Module()
        whole = site.kind == "parameter"
        names = {site.path.rpartition(".")[2]: site.path} if whole else {}
        names = names or {part: f"{site.path}.{part}" for part in ("weight", "bias")}
        for part, name in names.items():
            found = checkpoint.read(name) if name in checkpoint.entries else None
            if found is None and part != "bias":
                raise PlaitError(
                    f"{checkpoint.path} has no tensor {name!r}, which the adapters change; a tied "
                    "head may be stored under another name: pass the loaded model as base=."
                )
            held = None if found is None else nn.Parameter(found, requires_grad=False)
            holder.register_parameter(part, held)
        return holder

    return find
