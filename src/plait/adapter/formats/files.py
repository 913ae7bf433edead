"""`save_adapter`, `read_adapter` and `load`: one door to every format."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from torch import nn

from plait.adapter.adapter import Adapter
from plait.adapter.attaching import bind, check_free, install
from plait.adapter.formats import peft
from plait.adapter.formats.peft import read_peft
from plait.adapter.formats.peft_write import save_peft
from plait.adapter.formats.plait import DESCRIPTION, TENSORS, read_plait, save_plait
from plait.adapter.formats.single_file import read_single_file, save_diffusers, save_kohya
from plait.adapter.formats.tensors import PICKLED
from plait.errors import FormatError, unknown

PARTS = {DESCRIPTION, TENSORS, peft.CONFIG, peft.TENSORS, peft.PICKLE}
SINGLE = "pytorch_lora_weights.safetensors"  # diffusers' own name for its file
WRITERS: dict[str, Callable[[Adapter, Path], Path]] = {
    "plait": save_plait,
    "peft": save_peft,
    "kohya": save_kohya,
    "diffusers": save_diffusers,
}


def save_adapter(adapter: Adapter, path: str | Path, format: str = "plait") -> Path:
    """Write an adapter atomically; whatever was there stays intact until the new one is complete.

    Args:
        path: a folder ("plait", "peft"), or one file ("kohya", "diffusers").
        format: "plait" holds everything, exactly. "peft" is what PEFT and vLLM load; a method
            that PEFT lacks is written as the plain LoRA that equals it.

    Raises FormatError when the adapter has no exact form in that format, or cannot be written.
    """
    if format not in WRITERS:
        raise unknown("format", format, WRITERS)
    return WRITERS[format](adapter, Path(path))


def read_adapter(
    path: str | Path,
    name: str | None = None,
    *,
    model: nn.Module | None = None,
    allow_pickle: bool = False,
) -> Adapter:
    """The adapter in a file or folder, attached to nothing; the format is told from the content.

    Args:
        name: what to call it; None keeps the stored name (or the folder's).
        model: the base model. Some formats store less than an adapter needs without it; those
            then say so.
        allow_pickle: also read pickle files (with torch's `weights_only`). Off, because loading a
            pickle can run code that its author chose.

    Raises FormatError, in one line naming file and cause, for anything missing, damaged or unsafe.
    """
    adapter = _read(Path(path), name, model, allow_pickle)
    for delta in adapter.deltas.values():
        delta.site = delta.site.bare()
    return adapter


def _read(path: Path, name: str | None, model: nn.Module | None, allow_pickle: bool) -> Adapter:
    folder = path.parent if path.name in PARTS else path
    if (folder / DESCRIPTION).is_file():
        return read_plait(folder, name)
    if (folder / peft.CONFIG).is_file():
        return read_peft(folder, name, model, allow_pickle)
    file = path / SINGLE if (path / SINGLE).is_file() else path
    if file.is_file() and file.suffix in {".safetensors", *PICKLED}:
        return read_single_file(file, name, model, allow_pickle)
    raise _unreadable(path)


def load(
    model: nn.Module,
    path: str | Path,
    name: str | None = None,
    *,
    trainable: bool = False,
    activate: bool = True,
    allow_pickle: bool = False,
) -> Adapter:
    """Read an adapter and attach it to `model`.

    Args:
        name: what to call it there; None keeps the stored name.
        trainable: let its parameters train; frozen otherwise.
        activate: make it the only active adapter.
        allow_pickle: see `read_adapter`.

    Raises FormatError (unreadable) or PlaitError (made for another base; name already taken).
    """
    if name is not None:
        check_free(model, name)
    adapter = read_adapter(path, name, model=model, allow_pickle=allow_pickle)
    check_free(model, adapter.name)
    return install(model, bind(adapter, model), activate=activate, train=trainable)


def _unreadable(path: Path) -> FormatError:
    if not path.exists():
        if re.fullmatch(r"[\w.\-]+/[\w.\-]+", str(path)):
            return FormatError(
                f"{path}: no such file or folder; Plait does not download from a hub, so fetch it "
                "first (huggingface_hub.snapshot_download) and give the local path."
            )
        return FormatError(f"{path}: no such file or folder.")
    inside = [p.parent.name for p in path.glob("*/*.json") if p.name in PARTS]
    hint = f"; did you mean its folder {sorted(inside)[0]!r}?" if inside else "."
    return FormatError(f"{path}: holds no adapter ({DESCRIPTION} or {peft.CONFIG}){hint}")
