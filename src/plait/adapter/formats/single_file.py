"""Single-file LoRAs of image models: kohya's and diffusers', old and new names.

    kohya       lora_unet_down_blocks_0_..._to_q.lora_down.weight / .lora_up.weight / .alpha
    diffusers   unet.down_blocks.0...to_q.lora_A.weight / .lora_B.weight
                ...to_q.lora.down.weight, ...processor.to_q_lora.down.weight (older)

Kohya writes underscores for dots, so only the model can tell which module is meant: given the
model, names become its paths; without it, sites keep kohya's own names, which is enough to inspect,
merge and write such files. An alpha tensor gives the scale alpha / r; without one the scale is 1.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plait.adapter.adapter import Adapter
from plait.adapter.delta import Delta
from plait.adapter.formats.atomic import tensors_writer, write_file
from plait.adapter.formats.peft import name_of
from plait.adapter.formats.peft_build import Sorted, build_adapter_of
from plait.adapter.formats.tensors import read_tensors, warn_not_finite
from plait.adapter.method import PeftSite
from plait.adapter.registry import get_method
from plait.adapter.site import make_site
from plait.adapter.targets import base_modules
from plait.errors import FormatError, PlaitError, nearest

A, B, ALPHA = "lora_A.weight", "lora_B.weight", "alpha"
ENDINGS = {
    ".lora_down.weight": A,
    ".lora_up.weight": B,
    ".lora_A.weight": A,
    ".lora_B.weight": B,
    ".lora.down.weight": A,
    ".lora.up.weight": B,
    ".lora_linear_layer.down.weight": A,
    ".lora_linear_layer.up.weight": B,
    "_lora.down.weight": A,
    "_lora.up.weight": B,
    ".alpha": ALPHA,
}
PARTS = {
    "unet": "lora_unet",
    "transformer": "lora_transformer",
    "text_encoder": "lora_te",
    "text_encoder_2": "lora_te2",
    "text_encoder_3": "lora_te3",
}
"""The parts of a pipeline by diffusers' names, and kohya's prefixes for them."""
_KOHYA = re.compile(r"(lora_(?:unet|transformer|prior|te\d?)|lycoris|lora)_(.+)")
_OLD_ATTENTION = re.compile(r"\.processor\.to_(\w+)$")


def read_single_file(
    file: Path, name: str | None, model: nn.Module | None, allow_pickle: bool
) -> Adapter:
    """The LoRA in one file, attached to nothing; paths are the model's where it is given."""
    tensors, metadata = read_tensors(file, allow_pickle=allow_pickle)
    try:
        found = _gather(tensors, metadata)
        if model is not None:
            found = _resolve(file, found, model)
        sites = Sorted({p: PeftSite(p, s.config, s.tensors) for p, s in found.items()})
        adapter = build_adapter_of(get_method("lora"), {}, sites, model, name or name_of(file))
    except (PlaitError, TypeError, ValueError, LookupError, AttributeError, RuntimeError) as e:
        cause = f"lacks {e}" if type(e) is KeyError else " ".join(str(e).split())[:500]
        raise FormatError(f"{file}: {cause}") from e
    warn_not_finite(file, tensors)
    return adapter


def _gather(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, PeftSite]:
    """Each module's tensors under one set of names, with the configuration of its scale."""
    found: dict[str, PeftSite] = {}
    for name, tensor in tensors.items():
        if name.startswith("base_model."):
            raise FormatError("PEFT's tensors without their adapter_config.json have no scale.")
        ending = next((e for e in ENDINGS if name.endswith(e)), None)
        if ending is None:
            raise FormatError(f"tensor {name!r} belongs to no LoRA that Plait reads from one file.")
        module = _OLD_ATTENTION.sub(_modern_attention, name.removesuffix(ending))
        site = found.setdefault(module, PeftSite(module, {}))
        site.tensors[ENDINGS[ending]] = tensor
    if not found:
        raise FormatError("the file holds no tensors.")
    configs = _configurations(metadata)
    for module, site in found.items():
        part = module.partition(".")[0]
        rank = site.tensors[A].shape[0]
        site.config = {"r": rank, "lora_alpha": rank} | configs.get(part, {})
        if ALPHA in site.tensors:
            alpha = site.tensors.pop(ALPHA)
            site.config = {"r": rank, "lora_alpha": float(alpha)}
    return found


def _modern_attention(match: re.Match[str]) -> str:
    last = match.group(1)
    return ".to_out.0" if last == "out" else f".to_{last}"


def _configurations(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What newer diffusers records of each part: {"unet": {"r": ..., "lora_alpha": ...}}."""
    configs: dict[str, dict[str, Any]] = {}
    recorded = metadata.get("lora_adapter_metadata")
    for key, value in (json.loads(recorded) if recorded else {}).items():
        part, _, field = key.partition(".")
        if field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"):
            configs.setdefault(part, {})[field] = value
        elif field == "use_dora" and value:
            raise FormatError("use_dora in a single file is not read; save it as a PEFT folder.")
    return configs


# -- names to modules -----------------------------------------------------------------------------


def _resolve(file: Path, found: dict[str, PeftSite], model: nn.Module) -> dict[str, PeftSite]:
    """The same sites under the model's paths.

    A file may hold several parts (unet, text encoders) and the model be one of them: parts of
    which nothing fits are left out with a warning; one that fits only half is an error.
    """
    table = _table(model)
    resolved: dict[str, PeftSite] = {}
    groups: dict[str, dict[str, PeftSite]] = {}
    for module, site in found.items():
        groups.setdefault(_part_of(module), {})[module] = site
    fitting = {part: [m for m in g if _find(m, table)] for part, g in groups.items()}
    if not any(fitting.values()):
        example = next(iter(found))
        raise FormatError(f"none of its modules ({example!r}, ...) is in this model.")
    for part, group in groups.items():
        if not fitting[part]:
            warnings.warn(
                f"{file}: {len(group)} sites of {part!r} are left out, for this model has none of "
                "them.",
                stacklevel=5,
            )
            continue
        for module, site in group.items():
            paths = _find(module, table)
            if len(paths) != 1:
                guess = nearest(module, table)
                what = f"may mean {' or '.join(sorted(paths))}" if paths else "is not in this model"
                hint = f"; the nearest is {guess!r}" if guess and not paths else ""
                raise FormatError(f"{module!r} {what}{hint}.")
            resolved[paths[0]] = site
    return resolved


def _table(model: nn.Module) -> dict[str, list[str]]:
    """{any name a file may use for a module: the paths it stands for}."""
    table: dict[str, list[str]] = {}
    for path, module in base_modules(model):
        if not path or make_site(path, module) is None:
            continue
        part, _, rest = path.partition(".")
        names = {path, path.replace(".", "_")}
        if part in PARTS and rest:
            prefixes = {PARTS[part], "lora_te1" if part == "text_encoder" else PARTS[part]}
            names |= {f"{p}_{rest.replace('.', '_')}" for p in prefixes}
        for name in names:
            table.setdefault(name, []).append(path)
    return table


def _find(module: str, table: Mapping[str, list[str]]) -> list[str]:
    """Under its full name, or under what follows the part that the model itself may be."""
    names = [module]
    if (kohya := _KOHYA.fullmatch(module)) is not None:
        names.append(kohya.group(2))
    elif module.partition(".")[0] in PARTS:
        names.append(module.partition(".")[2])
    # CLIP's text model lost a level of its names in transformers 5; files keep the old ones.
    names += [re.sub(r"text_model[._]", "", n, count=1) for n in names]
    return next((table[n] for n in names if n in table), [])


def _part_of(module: str) -> str:
    kohya = _KOHYA.fullmatch(module)
    if kohya is not None:
        return kohya.group(1)
    part = module.partition(".")[0]
    return part if part in PARTS else "the file"


# -- writing ------------------------------------------------------------------------------------


def save_kohya(adapter: Adapter, file: Path) -> Path:
    """One file with kohya's names; alpha tensors carry the scale."""
    tensors: dict[str, Tensor] = {}
    ranks = set()
    for path, (down, up, scale) in _pairs(adapter, file).items():
        name = _kohya_name(path, adapter)
        tensors[f"{name}.lora_down.weight"] = down
        tensors[f"{name}.lora_up.weight"] = up
        tensors[f"{name}.alpha"] = torch.tensor(float(scale * len(down)))
        ranks.add(len(down))
    if len(tensors) != 3 * len(adapter.deltas):
        raise FormatError(f"{file}: two sites have the same name once dots are underscores.")
    metadata = {"format": "pt", "ss_network_module": "networks.lora"}
    metadata["ss_network_dim"] = str(max(ranks))
    return write_file(_with_ending(file), tensors_writer(tensors, metadata))


def save_diffusers(adapter: Adapter, file: Path) -> Path:
    """One file with diffusers' names; the scale is multiplied into B, as those files have none."""
    tensors: dict[str, Tensor] = {}
    for path, (down, up, scale) in _pairs(adapter, file).items():
        part, rest = _split(path, adapter)
        name = f"{part}.{rest}"
        tensors[f"{name}.{A}"] = down
        tensors[f"{name}.{B}"] = up * scale
    return write_file(_with_ending(file), tensors_writer(tensors, {"format": "pt"}))


def _pairs(adapter: Adapter, file: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """{path: (A, B, scale)} in the shapes of the modules' weights."""
    found = {}
    for path, delta in adapter.deltas.items():
        low = delta.factors() if delta.site.kind in ("linear", "conv") else None
        if low is None or delta.bias() is not None:
            raise FormatError(f"{file}: {_why_not(adapter, delta)}")
        down, up = low.A.detach(), low.B.detach()
        if delta.site.kind == "conv":
            kernel = delta.site.details["kernel"]
            down = down.reshape(len(down), *kernel)
            up = up.reshape(*up.shape, *[1] * (len(kernel) - 1))
        found[path] = (down, up, float(low.scale))
    return found


def _why_not(adapter: Adapter, delta: Delta) -> str:
    return (
        f"{adapter.method.name!r} at {delta.site.path!r} ({delta.site.kind}) is no exact LoRA of a "
        "linear layer or convolution, which is all this format holds; see adapter.to_lora()."
    )


def _kohya_name(path: str, adapter: Adapter) -> str:
    if _KOHYA.fullmatch(path) and "." not in path:
        return path  # read from such a file without its model
    part, rest = _split(path, adapter)
    two = any(p.startswith("text_encoder_2.") for p in adapter.deltas)
    prefix = "lora_te1" if part == "text_encoder" and two else PARTS[part]
    return f"{prefix}_{rest.replace('.', '_')}"


def _split(path: str, adapter: Adapter) -> tuple[str, str]:
    """The part of a pipeline that a site lies in (told from the model's class where its path does
    not say), and its name there."""
    part, _, rest = path.partition(".")
    if part not in PARTS or not rest:
        kind, rest = type(adapter.model).__name__, path
        part = "transformer" if "Transformer" in kind else "unet"
        part = "text_encoder" if "Text" in kind else part
    if part.startswith("text_encoder") and rest.startswith("encoder.layers."):
        rest = f"text_model.{rest}"  # as all these files call it, whatever transformers does
    return part, rest


def _with_ending(file: Path) -> Path:
    return file if file.suffix == ".safetensors" else file.with_name(file.name + ".safetensors")
