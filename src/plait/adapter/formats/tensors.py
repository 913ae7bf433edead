"""Reading tensor files that came from anywhere: checked, quick, never executed."""

from __future__ import annotations

import json
import re
import struct
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.errors import FormatError

MAX_NAME = 1024
MAX_JSON = 256 * 2**20
PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAME = re.compile(r"[\w.:\-|]+")


def read_tensors(
    file: Path, *, allow_pickle: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata.

    Raises FormatError, in one line naming the file and the cause, for a file that is missing,
    truncated, or whose header, names or types do not hold up; and for pickle files, which can run
    code when they are loaded, unless `allow_pickle` (then read with torch's `weights_only`).
    """
    if not file.is_file():
        raise FormatError(f"{file}: no such file.")
    if file.suffix in PICKLED:
        return _read_pickle(file, allow_pickle), {}
    tensors, metadata = _read_safetensors(file)
    check_names(file, tensors)
    return tensors, metadata


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Checked by safetensors itself, then read in one go: views of one buffer of our own.

    A mapping of the file would break (SIGBUS) when another program truncates it, and asking for
    the tensors one by one costs ten times the reading.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length))
            data = torch.empty(file.stat().st_size - 8 - length, dtype=torch.uint8)
            opened.readinto(data.numpy().data)
        metadata = header.pop("__metadata__", {})
        tensors = {name: _view(data, facts) for name, facts in header.items()}
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, struct.error) as e:
        cause = f"unknown type {e}" if type(e) is KeyError else _one_line(e)
        raise FormatError(f"{file}: damaged, or not a safetensors file ({cause}).") from None
    return tensors, metadata


def _view(data: Tensor, facts: dict[str, Any]) -> Tensor:
    dtype = DTYPES[facts["dtype"]]
    begin, end = facts["data_offsets"]
    raw = data[begin:end]
    if begin % dtype.itemsize:
        raw = raw.clone()  # not aligned to its type
    return raw.view(dtype).view(facts["shape"])


def _read_pickle(file: Path, allowed: bool) -> dict[str, Tensor]:
    if not allowed:
        raise FormatError(
            f"{file}: a pickle file, which can run code when it is loaded; convert it with "
            "safetensors.torch.save_file, or pass allow_pickle=True if you trust its source."
        )
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # pickle raises whatever it likes
        raise FormatError(f"{file}: cannot be read as tensors ({_one_line(e)}).") from None
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise FormatError(f"{file}: holds something other than named tensors.")
    check_names(file, found)
    return found


def check_names(file: Path, names: Iterable[str]) -> None:
    """Tensor names must look like module paths."""
    for name in names:
        if len(name) > MAX_NAME or not _NAME.fullmatch(name) or ".." in name:
            raise FormatError(f"{file}: {name[:80]!r} is not the name of a tensor in a model.")


def warn_not_finite(file: Path, tensors: dict[str, Tensor]) -> None:
    """A warning that names the first tensor with NaN or infinity; loading goes on."""
    checked = {n: t for n, t in tensors.items() if t.is_floating_point() and t.itemsize > 1}
    # One sum over the whole file says almost always that there is nothing to look for.
    if torch.isfinite(sum((t.sum() for t in _runs(checked.values())), torch.zeros(()))):
        return
    for name, tensor in checked.items():
        if not torch.isfinite(tensor).all():
            warnings.warn(f"{file}: {name!r} holds NaN or infinity.", stacklevel=4)
            return


def _runs(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The same values in as few tensors as possible: neighbours in one buffer as one view."""
    runs: list[Tensor] = []
    for tensor in sorted(tensors, key=lambda t: t.data_ptr()):
        last = runs[-1] if runs else None
        if (
            last is not None
            and last.dtype == tensor.dtype
            and last.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
            and last.storage_offset() + last.numel() == tensor.storage_offset()
        ):
            size = last.numel() + tensor.numel()
            runs[-1] = last.as_strided((size,), (1,), last.storage_offset())
        else:
            runs.append(tensor.reshape(-1))
    return runs


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; anything else is a FormatError."""
    try:
        if file.stat().st_size > MAX_JSON:
            raise FormatError(f"{file}: {file.stat().st_size} bytes are too many to be a config.")
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        if isinstance(e, FormatError):
            raise
        raise FormatError(f"{file}: not readable as JSON ({_one_line(e)}).") from None
    if not isinstance(value, dict):
        raise FormatError(f"{file}: must hold a JSON object, not {type(value).__name__}.")
    return value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
