"""From PEFT's tensors to an adapter: which tensor belongs where, and the sites they make."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from plait.adapter.adapter import Adapter
from plait.adapter.build import build_adapter, make_options
from plait.adapter.method import Method, PeftCodec, PeftSite
from plait.adapter.site import Site, make_parameter_site, make_site
from plait.adapter.targets import base_modules
from plait.errors import FormatError, nearest

PREFIX = "base_model.model."


@dataclass
class Sorted:
    """A folder's tensors by what they are."""

    sites: dict[str, PeftSite] = field(default_factory=dict)
    nested: dict[str, list[PeftSite]] = field(default_factory=dict)
    """Wrappers of raw parameters by module, the outermost first."""
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)
    """Whole tensors of the base by path: trained biases, and copies that PEFT adds."""
    shared: dict[str, Tensor] = field(default_factory=dict)


# -- sorting the tensors --------------------------------------------------------------------------


def sort_tensors(tensors: Mapping[str, Tensor], config: dict[str, Any], codec: PeftCodec) -> Sorted:
    found = Sorted()
    endings = sorted(codec.keys.values(), key=len, reverse=True)
    saved = list(config.get("modules_to_save") or [])
    depth = re.compile(r"(?:\.base_layer)+$")
    for name, tensor in tensors.items():
        path = name.removeprefix(PREFIX)
        ending = next((e for e in endings if path.endswith("." + e)), None)
        module = _module_to_save(path, saved)
        if name in codec.shared.values():
            found.shared[name] = tensor  # PEFT may name its parts under the sites alike
        elif ending is not None:
            owner = path[: -len(ending) - 1]
            # Only wrappers of raw parameters nest, and only they have base_layer in these names.
            plain = depth.sub("", owner)
            level = (len(owner) - len(plain)) // len(".base_layer")
            if config.get("target_parameters") and _holds_parameter(plain, config):
                wrappers = found.nested.setdefault(plain, [])
                while len(wrappers) <= level:
                    wrappers.append(PeftSite(plain, config, {}, found.shared))
                wrappers[level].tensors[ending] = tensor
            else:
                site = found.sites.setdefault(owner, PeftSite(owner, config, {}, found.shared))
                site.tensors[ending] = tensor
        elif module is not None:
            found.modules.setdefault(module, {})[path[len(module) + 1 :]] = tensor
        elif name.startswith("base_model.") and not name.startswith(PREFIX):
            found.shared[name] = tensor
        elif path.endswith((".bias", ".weight")) and "lora_" not in path:
            found.base[path.replace(".base_layer.", ".")] = tensor
        else:
            raise FormatError(f"tensor {name!r} is not part of any PEFT adapter that Plait reads.")
    return found


def _module_to_save(path: str, names: list[str]) -> str | None:
    """The shortest leading part of `path` that one of PEFT's modules_to_save names."""
    parts = path.split(".")
    heads = (".".join(parts[:n]) for n in range(1, len(parts)))
    return next((h for h in heads if any(h.endswith(n) for n in names)), None)


def _holds_parameter(module: str, config: Mapping[str, Any]) -> bool:
    owners = {t.rpartition(".")[0] for t in config["target_parameters"]}
    return any(module == o or module.endswith("." + o) or o == "" for o in owners)


# -- building -------------------------------------------------------------------------------------


def build_adapter_of(
    method: Method,
    config: dict[str, Any],
    found: Sorted,
    model: nn.Module | None,
    name: str,
) -> Adapter:
    """The adapter of the tensors in `found`, read by the method's codec."""
    codec = method.peft
    assert codec is not None
    modules = {} if model is None else dict(base_modules(model))
    _name_parameters(found, config, modules)
    whole = PeftSite("", config, {}, found.shared)
    pieces, by_site = [], {}
    for path in _in_order(found.sites, modules):
        here = found.sites[path]
        site = _site(path, here, codec, modules)
        if method.delta is None or site.kind not in method.delta.kinds:
            raise FormatError(f"{path!r} is a {site.kind}, on which {method.name!r} does not act.")
        pieces.append((site, method.delta))
        by_site[path] = make_options(method, codec.options(here))
    if not pieces and not found.modules:
        raise FormatError("the folder holds no adapter tensors.")
    options = make_options(method, codec.options(whole))
    info = {"base": config.get("base_model_name_or_path"), "task_type": config.get("task_type")}
    info = {k: v for k, v in info.items() if v}
    adapter = build_adapter(name, method, pieces, options, by_site=by_site, info=info)
    _fill(adapter, codec, found)
    return adapter


def _in_order(paths: Iterable[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """The model's order, or layer 2 before layer 10 where there is no model."""
    if modules:
        place = {p: i for i, p in enumerate(modules)}
        return sorted(paths, key=lambda p: place.get(p, place.get(p.rpartition(".")[0], -1)))
    digits = re.compile(r"(\d+)")
    return sorted(paths, key=lambda p: [int(x) if x.isdigit() else x for x in digits.split(p)])


def _site(path: str, here: PeftSite, codec: PeftCodec, modules: dict[str, nn.Module]) -> Site:
    if not modules:
        site = codec.site(here)
        if site is None:
            raise FormatError(
                f"{path!r} in a {codec.type} adapter does not say the size of its weight; pass "
                "model= (or use plait.load)."
            )
        return site
    owner, _, last = path.rpartition(".")
    if path in modules:
        made = make_site(path, modules[path])
        if made is None:
            raise FormatError(f"{path!r} is a {type(modules[path]).__name__}, without a weight.")
        return made
    if owner in modules and last in modules[owner]._parameters:
        return make_parameter_site(path, modules[owner], last)
    guess = nearest(path, modules)
    hint = f"; the nearest is {guess!r}" if guess else ""
    raise FormatError(f"the model has no module {path!r}{hint}. Is it the right base model?")


def _name_parameters(
    found: Sorted, config: Mapping[str, Any], modules: Mapping[str, nn.Module]
) -> None:
    """Give every wrapper of a raw parameter its site: PEFT wraps in the module's own order."""
    for path, wrappers in found.nested.items():
        if path not in modules:
            raise FormatError(
                f"target_parameters at {path!r} can only be told apart with the model; pass model= "
                "(or use plait.load), and check that it is the right base."
            )
        targets = config["target_parameters"]
        own = [n for n in modules[path]._parameters if _is_target(f"{path}.{n}", targets)]
        if len(own) != len(wrappers):
            raise FormatError(f"{path!r} has {len(own)} target parameters, not {len(wrappers)}.")
        for parameter, wrapper in zip(reversed(own), wrappers, strict=True):
            wrapper.path = f"{path}.{parameter}"
            # Patterns name the parameter's module or the parameter, as PEFT matches its targets.
            found.sites[wrapper.path] = wrapper


def _is_target(path: str, targets: list[str]) -> bool:
    return any(path == t or path.endswith("." + t) for t in targets)


def _fill(adapter: Adapter, codec: PeftCodec, found: Sorted) -> None:
    with torch.no_grad():
        for own, theirs in codec.shared.items():
            if (
                theirs not in found.shared
                or found.shared[theirs].shape != adapter.shared[own].shape
            ):
                raise FormatError(
                    f"{theirs!r} is missing, or not {list(adapter.shared[own].shape)}; let PEFT "
                    "save what its layers share (frozen projections) too."
                )
            if own in adapter.shared._parameters:
                adapter.shared[own].copy_(found.shared[theirs])  # a pool that goes on training
            else:
                adapter.shared.keep(own, found.shared[theirs])
        for path, here in found.sites.items():
            delta = adapter.deltas[path]
            if codec.read is not None:
                codec.read(delta, here)
                continue
            for own, theirs in codec.keys.items():
                if delta.get_parameter(own).shape != here.tensors[theirs].shape:
                    raise FormatError(
                        f"{path!r}: {theirs} has shape {list(here.tensors[theirs].shape)}, but "
                        f"{list(delta.get_parameter(own).shape)} is needed."
                    )
                delta.get_parameter(own).copy_(here.tensors[theirs])
