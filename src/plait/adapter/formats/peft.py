"""Reading PEFT's folders: adapter_config.json and adapter_model.safetensors.

The tensors' names say where the adapter acts (whatever selected those modules: lists, patterns,
exclusions, layers); the configuration gives ranks, scales and the method. Keys that would change
the mathematics in a way that Plait does not have are refused; what else is unknown is a warning.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plait.adapter import registry
from plait.adapter.adapter import Adapter
from plait.adapter.formats.limits import limit_allocation
from plait.adapter.formats.peft_build import build_adapter_of, sort_tensors
from plait.adapter.formats.tensors import read_json, read_tensors, warn_not_finite
from plait.adapter.method import Method, PeftCodec
from plait.adapter.replacement import add_parameter, add_replacement
from plait.adapter.targets import base_modules, block_width
from plait.errors import FormatError, PlaitError

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

HARMLESS_KEYS = """
    peft_type auto_mapping peft_version base_model_name_or_path revision task_type inference_mode
    target_modules exclude_modules layers_to_transform layers_pattern fan_in_fan_out bias
    modules_to_save target_parameters r lora_alpha lora_dropout use_rslora use_dora lora_bias
    rank_pattern alpha_pattern init_lora_weights megatron_config megatron_core loftq_config
    eva_config corda_config lora_ga_config velora_config qalora_group_size runtime_config
    init_weights init_ia3_weights feedforward_modules projection_prng_key save_projection
    vera_dropout d_initial mask_type random_seed miss_dropout mini_r
"""
HARMLESS = frozenset(HARMLESS_KEYS.split())
"""Keys that are read, or that do not change what a finished adapter computes."""


def read_peft(
    folder: Path, name: str | None, model: nn.Module | None, allow_pickle: bool
) -> Adapter:
    """The adapter in a PEFT folder, attached to nothing."""
    file = folder / CONFIG
    config = read_json(file)
    weights = folder / (TENSORS if (folder / TENSORS).is_file() else PICKLE)
    tensors, _ = read_tensors(
        weights if weights.is_file() else folder / TENSORS, allow_pickle=allow_pickle
    )
    try:
        method, codec = find_codec(config)
        check_config(config, codec, file)
        found = sort_tensors(tensors, config, codec)
        shapes = [{"shape": list(t.shape)} for t in tensors.values()]
        described = {"options": _sizes(config), "sites": shapes}
        with limit_allocation(described, tensors, str(file)):
            adapter = build_adapter_of(method, config, found, model, name or name_of(folder))
        _add_base_tensors(adapter, found.base, config, model)
        _add_modules(adapter, found.modules, model)
    except (PlaitError, TypeError, ValueError, LookupError, AttributeError, RuntimeError) as e:
        cause = f"lacks {e}" if type(e) is KeyError else " ".join(str(e).split())[:500]
        raise FormatError(f"{folder}: {cause.removeprefix(f'{file}: ')}") from e
    warn_not_finite(weights, tensors)
    return adapter


def find_codec(config: Mapping[str, Any]) -> tuple[Method, PeftCodec]:
    """The method whose codec takes this configuration."""
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        raise FormatError("adapter_config.json names no peft_type.")
    refusing: tuple[Method, PeftCodec] | None = None
    for method in _methods(kind.lower()):
        codec = method.peft
        if codec is None or codec.type != kind or not codec.accepts(dict(config)):
            continue
        if _lacking(codec, config) is None:
            return method, codec
        refusing = refusing or (method, codec)  # a kin of the method may have what it lacks
    if refusing is not None:
        return refusing
    known = sorted({m.peft.type for m in _methods(None) if m.peft is not None})
    raise FormatError(f"PEFT type {kind!r} is not one that Plait reads ({', '.join(known)}).")


def _methods(first: str | None) -> Iterator[Method]:
    """Parameterisations, the one of that name first: the others need not be imported then."""
    if first in registry.names():  # in whatever room: some bring their own rule
        yield registry.get_method(first)
    for name in registry.names(None if first is None else "methods"):
        if name != first:
            method = registry.get_method(name)
            if method.axis == "parameterisation":
                yield method


def check_config(config: Mapping[str, Any], codec: PeftCodec, file: Path) -> None:
    """Refuse what would compute something else; warn of what cannot be judged."""
    key = _lacking(codec, config)
    if key is not None:
        raise FormatError(
            f"{key}={config[key]!r} changes what the adapter computes, in a way Plait lacks."
        )
    known = HARMLESS | codec.required.keys() | set(codec.settings)
    strange = {k: v for k, v in config.items() if k not in known}
    strange = {k: v for k, v in strange.items() if v not in (None, False, [], {}, "")}
    for key, value in strange.items():
        if key.startswith("use_") and value is True:
            raise FormatError(f"{key}=True is a switch that this Plait does not know.")
    if strange:
        keys = ", ".join(sorted(strange))
        warnings.warn(f"{file}: unknown keys are ignored: {keys}.", stacklevel=5)


def _lacking(codec: PeftCodec, config: Mapping[str, Any]) -> str | None:
    """A key of the configuration that asks for mathematics which the codec's method lacks."""
    plain: tuple[Any, ...] = (None, False, [], {})
    asked = (k for k, v in codec.required.items() if config.get(k) not in (v, *plain))
    return next(asked, None)


def _sizes(config: Mapping[str, Any]) -> list[Any]:
    return [config.get("r"), config.get("rank_pattern"), config.get("mini_r")]


def name_of(path: Path) -> str:
    """An adapter's name from the folder or file it was found in."""
    stem = path.resolve().name.removesuffix(path.suffix if path.is_file() else "")
    return re.sub(r"[^A-Za-z0-9_\-]+", "-", stem).strip("-") or "default"


# -- what comes beside the method's tensors -----------------------------------------------------


def _add_base_tensors(
    adapter: Adapter, base: Mapping[str, Tensor], config: Mapping[str, Any], model: nn.Module | None
) -> None:
    """Trained biases, and base weights that PEFT copies along when an embedding is a target."""
    if base and model is None:
        biases = [p for p in base if p.endswith(".bias")]
        if biases and config.get("bias", "none") != "none":
            raise FormatError(
                f"bias={config['bias']!r}: trained biases such as {biases[0]!r} can only be read "
                "beside the base; pass model= (or use plait.load)."
            )
        warnings.warn(
            f"{adapter.name}: a copy of the base's {next(iter(base))!r} was not compared with the "
            "base; pass model= to do so.",
            stacklevel=5,
        )
        return
    modules = {} if model is None else dict(base_modules(model))
    for path, saved in base.items():
        owner, _, last = path.rpartition(".")
        held = modules[owner]._parameters.get(last) if owner in modules else None
        if held is None:
            raise FormatError(f"the model has no parameter {path!r}.")
        if held.shape != saved.shape:
            raise FormatError(
                f"{path!r} is {list(saved.shape)} in the folder and {list(held.shape)} in the "
                "model; resize the model first (model.resize_token_embeddings)."
            )
        if not torch.equal(held.detach(), saved.to(held.device, held.dtype)):
            change = saved.to(held.device, torch.float32) - held.detach().float()
            add_parameter(adapter, path, change, modules[owner])


def _add_modules(
    adapter: Adapter, saved: Mapping[str, dict[str, Tensor]], model: nn.Module | None
) -> None:
    modules = {} if model is None else dict(base_modules(model))
    for path, tensors in saved.items():
        module = modules.get(path)
        if model is None:
            width = next(iter(tensors.values())).shape[0]
            trained = {n: nn.Parameter(t) for n, t in tensors.items() if t.is_floating_point()}
            add_replacement(adapter, path, {**tensors, **trained}, None, width)
            continue
        if module is None:
            raise FormatError(f"the model has no module {path!r}, of which the folder has a copy.")
        own = module.state_dict(keep_vars=True)
        if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in tensors.items()}:
            raise FormatError(f"the tensors of {path!r} do not fit the module in this model.")
        add_replacement(adapter, path, own, module, block_width(model, module)).fill(tensors)
