"""Writing PEFT's folders, with no key that an older PEFT, vLLM or diffusers would stumble over.

A method that PEFT has is written in PEFT's form; any other is written as the plain LoRA that equals
it, and refused when none does. Held-back starts become part of a LoRA of rank 2 r against the
original base, so nobody needs to know how training began.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from plait.adapter.adapter import Adapter, DeltaMap
from plait.adapter.convert import to_lora
from plait.adapter.delta import Delta
from plait.adapter.formats import plait as own_format
from plait.adapter.formats.atomic import json_writer, tensors_writer, text_writer, write_folder
from plait.adapter.formats.peft import CONFIG, TENSORS
from plait.adapter.formats.peft_build import PREFIX
from plait.adapter.method import PeftCodec
from plait.adapter.replacement import ParameterDelta, ReplacementDelta, is_extra
from plait.adapter.targets import base_modules
from plait.errors import FormatError, PlaitError


def save_peft(adapter: Adapter, path: Path) -> Path:
    """Write the folder atomically; FormatError when the adapter has no exact form in PEFT."""
    if (path / own_format.DESCRIPTION).exists():
        raise FormatError(
            f"{path} holds an adapter in Plait's own format; choose another folder for PEFT's."
        )
    try:
        config, tensors = to_peft(adapter)
    except PlaitError as e:
        raise FormatError(f"{path}: {e}") from None
    files = {
        TENSORS: tensors_writer(tensors, {"format": "pt"}),
        "README.md": text_writer(_card(config, adapter)),
        CONFIG: json_writer(config),
    }
    return write_folder(path, files)


def to_peft(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's configuration and tensors for an adapter."""
    main, codec = _in_peft(adapter)
    tensors: dict[str, Tensor] = {}
    modules = _modules(adapter)
    for delta in main.values():
        for ending, tensor in _tensors_of(delta, codec).items():
            tensors[f"{PREFIX}{_owner(delta, main, modules)}.{ending}"] = tensor.detach()
    for own, theirs in codec.shared.items():
        tensors[theirs] = next(iter(main.values())).shared[own].detach()
    config = {"peft_type": codec.type} | _common(adapter, main, modules) | codec.config(main)
    extras = {p: d for p, d in adapter.deltas.items() if is_extra(d)}
    more = _add_extras(extras, main, tensors, modules)
    if lacking := more.keys() - config.keys():
        raise FormatError(
            f"PEFT's {codec.type} has no {sorted(lacking)[0]}; save in Plait's format."
        )
    return config | more, tensors


def _in_peft(adapter: Adapter) -> tuple[dict[str, Delta], PeftCodec]:
    """The deltas to write, converted to a plain LoRA where PEFT lacks the method."""
    main = DeltaMap({p: d for p, d in adapter.deltas.items() if not is_extra(d)})
    codec = adapter.method.peft
    if codec is None and main:
        alone = Adapter(
            adapter.name, adapter.method, adapter.options, main, adapter.shared, adapter.seed
        )
        inexact = [p for p, d in main.items() if d.factors() is None]
        if inexact:
            raise FormatError(
                f"{adapter.method.name!r} has no exact low-rank form at {inexact[0]!r}; save an "
                "approximation with adapter.to_lora(energy=0.99) or to_lora(rank=...)."
            )
        converted = to_lora(alone)
        codec = converted.method.peft
        # Where the site is, the base module tells how it stores its weight.
        for path, delta in converted.deltas.items():
            delta.site = main[path].site
        main = converted.deltas
    if codec is None:
        raise FormatError("the adapter has no deltas that PEFT could hold.")
    kept = {p: d for p, d in main.items() if getattr(d, "rank", 1) != 0}
    if not kept:
        raise FormatError("every site has rank 0: there is nothing to write.")
    return kept, codec


def _tensors_of(delta: Delta, codec: PeftCodec) -> dict[str, Tensor]:
    if codec.write is not None:
        return codec.write(delta)
    return {theirs: delta.get_parameter(own) for own, theirs in codec.keys.items()}


# -- configuration ------------------------------------------------------------------------------


def _common(
    adapter: Adapter, main: Mapping[str, Delta], modules: Mapping[str, nn.Module]
) -> dict[str, Any]:
    packed = sorted(p for p, d in main.items() if d.site.kind == "parameter")
    plain = [p for p, d in main.items() if d.site.kind != "parameter"]
    base = adapter.info.get("base") or _base_name(adapter.model)
    config: dict[str, Any] = {
        "base_model_name_or_path": base,
        "task_type": adapter.info.get("task_type") or _task_type(adapter.model),
        "inference_mode": True,
        "target_modules": minimal_targets(plain, modules) if plain else [],
        "modules_to_save": None,
    }
    return config | ({"target_parameters": packed} if packed else {})


def _base_name(model: nn.Module | None) -> str | None:
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def _task_type(model: nn.Module | None) -> str | None:
    return "CAUSAL_LM" if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) else None


def _modules(adapter: Adapter) -> dict[str, nn.Module]:
    return {} if adapter.model is None else {p: m for p, m in base_modules(adapter.model) if p}


def minimal_targets(paths: Sequence[str], modules: Collection[str]) -> list[str] | str:
    """The shortest endings that match exactly `paths` among `modules`, as PEFT matches them.

    Without the model's module names, the paths themselves; a pattern where endings cannot tell.
    """
    wanted, left = set(paths), set(paths)
    chosen: list[str] = []
    by_length = range(1, max(p.count(".") for p in paths) + 2) if modules else range(0)
    for length in by_length:
        for ending in sorted({".".join(p.split(".")[-length:]) for p in left}):
            hits = {m for m in modules if m == ending or m.endswith("." + ending)}
            if hits <= wanted and hits & left:
                chosen.append(ending)
                left -= hits
    chosen += sorted(left)
    hits = {m for m in modules if any(m == c or m.endswith("." + c) for c in chosen)}
    if modules and hits != wanted:
        return "|".join(re.escape(p) for p in sorted(wanted))
    return chosen


# -- what stands beside the method's tensors ----------------------------------------------------


def _owner(delta: Delta, main: Mapping[str, Delta], modules: Mapping[str, nn.Module]) -> str:
    """The module part of a tensor's name; PEFT nests one wrapper for each raw parameter."""
    path = delta.site.path
    if delta.site.kind != "parameter":
        return path
    module, _, name = path.rpartition(".")
    if module not in modules:
        raise FormatError(f"{path!r} is a raw parameter: attach the adapter before saving it.")
    own = [n for n in modules[module]._parameters if f"{module}.{n}" in main]
    return module + ".base_layer" * (len(own) - 1 - own.index(name))


def _add_extras(
    extras: Mapping[str, Delta],
    main: Mapping[str, Delta],
    tensors: dict[str, Tensor],
    modules: Mapping[str, nn.Module],
) -> dict[str, Any]:
    """Write replaced modules and changed parameters; the keys that announce them."""
    whole = {p: d for p, d in extras.items() if isinstance(d, ReplacementDelta)}
    for path, delta in whole.items():
        others = [m for m in modules if m.endswith(path) and m != path]
        if others:
            raise FormatError(
                f"PEFT would save {others[0]!r} along with {path!r}, whose name ends the same way; "
                "save in Plait's format."
            )
        tensors |= {f"{PREFIX}{path}.{n}": t.detach() for n, t in delta.tensors().items()}
    config: dict[str, Any] = {"modules_to_save": sorted(whole)} if whole else {}
    owners = []
    for path, extra in extras.items():
        if isinstance(extra, ParameterDelta):
            owner, _, name = path.rpartition(".")
            owners += [owner] if name == "bias" else []
            place = f"{owner}.base_layer" if owner in main else owner
            value = extra.site.weight() + extra.dense()
            tensors[f"{PREFIX}{place}.{name}"] = value.detach()
    if owners:
        config["bias"] = "lora_only" if set(owners) <= set(main) else "all"
    return config


def _card(config: Mapping[str, Any], adapter: Adapter) -> str:
    base = config["base_model_name_or_path"]
    head = ["---", *([f"base_model: {base}"] if base else []), "library_name: peft"]
    head += ["tags:", "- plait", "- lora", "---", ""]
    how = f"Method: {adapter.method.title} ({adapter.method.paper})."
    use = f'    model = PeftModel.from_pretrained(base_model, "path/to/{adapter.name}")'
    return "\n".join([*head, f"# {adapter.name}", "", how, "", use, ""])
