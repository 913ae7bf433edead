"""Pruned models on disk: plain checkpoints where a configuration says their sizes, else with a
note beside them.

    config.json, model.safetensors    as `save_pretrained` writes them
    pruned.json                       only where no configuration gives these shapes: "shapes" of
                                      every tensor that was cut, "attributes" of modules; read by
                                      `load_pruned`, refused by `from_pretrained` (other shapes)
"""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from plait.adapter.formats.atomic import json_writer, tensors_writer
from plait.adapter.formats.tensors import read_json, read_tensors
from plait.adapter.targets import base_modules
from plait.compression.pruning.removal import layer_sizes, set_attributes
from plait.compression.pruning.sizes import set_all, shapes_of
from plait.errors import FormatError, PlaitError

if TYPE_CHECKING:
    from plait.compression.pruning.cutting import Pruned

NOTE, WEIGHTS = "pruned.json", "model.safetensors"
FORMAT = "plait-pruned"


def save_pruned(pruned: Pruned, path: Path, tokenizer: Any = None) -> Path:
    """Write the base model's folder under a hidden name and rename it; see `Pruned.save`."""
    if path.exists():
        raise FormatError(f"{path} exists already; give another folder for the pruned model.")
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    try:
        staging.mkdir()
        model: Any = pruned.model
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(staging)
        else:
            tensors_writer(model.state_dict(), {"format": "pt"})(staging / WEIGHTS)
        if pruned.config is None:
            shapes = {name: list(shape) for name, shape in shapes_of(model).items()}
            note = {"format": FORMAT, "version": 1, "attributes": pruned.attributes}
            json_writer({**note, "shapes": shapes})(staging / NOTE)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        os.replace(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return path


def load_pruned(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The model in a folder that `Pruned.save` wrote, in eval mode.

    model: the whole one, of another library than transformers; it is cut in place.
    Raises FormatError for anything missing or damaged.
    """
    folder = Path(path)
    if not (folder / NOTE).is_file():
        if model is not None:
            raise FormatError(f"{folder} holds no {NOTE}: load it as any other checkpoint.")
        return _built(folder, pretrained=True).eval()
    note = read_json(folder / NOTE)
    if note.get("format") != FORMAT or note.get("version") != 1:
        raise FormatError(f"{folder / NOTE}: no pruned model that this Plait reads.")
    made = model if model is not None else _built(folder, pretrained=False)
    try:
        _shrink(made, note)
        tensors, _ = read_tensors(folder / WEIGHTS)
        missing = _tied_aside(made, set(tensors))
        problem = made.load_state_dict(tensors, strict=False)
        if problem.unexpected_keys or set(problem.missing_keys) - missing:
            raise FormatError(f"{folder / WEIGHTS} holds other tensors than {NOTE} says.")
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as e:
        raise FormatError(f"{folder / NOTE}: {' '.join(str(e).split())[:200]}") from e
    return made.eval()


def _built(folder: Path, pretrained: bool) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(os.fspath(folder))
    kind = (getattr(config, "architectures", None) or [""])[0]
    cls: Any = getattr(transformers, kind, None)
    if cls is None:
        raise PlaitError(f"{folder}: transformers has no {kind or 'model'!r}; pass model=.")
    return cls.from_pretrained(os.fspath(folder)) if pretrained else cls._from_config(config)


def _shrink(model: nn.Module, note: Any) -> None:
    made: dict[int, torch.Tensor] = {}
    for path, module in base_modules(model):
        held: Any
        for held in (module._parameters, module._buffers):
            for leaf, tensor in held.items():
                name = f"{path}.{leaf}" if path else leaf
                shape = note["shapes"].get(name)
                if tensor is None or shape is None or list(tensor.shape) == shape:
                    continue
                if id(tensor) not in made:
                    empty = torch.zeros(shape, dtype=tensor.dtype)
                    needed = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty) if needed else empty
                held[leaf] = made[id(tensor)]
        set_attributes(module, layer_sizes(module))
    set_all(model, note["attributes"])


def _tied_aside(model: nn.Module, stored: set[str]) -> set[str]:
    """Names that are stored under another one."""
    tensors = model.state_dict(keep_vars=True)
    known = {id(t) for n, t in tensors.items() if n in stored}
    return {n for n, t in tensors.items() if n not in stored and id(t) in known}
