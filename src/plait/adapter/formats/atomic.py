"""Writing files so that a full disk, Ctrl-C or a crash leaves the previous one intact.

Everything is first written and flushed under a hidden temporary name where it belongs, and only
then renamed. A folder that did not exist appears in one rename; in one that did, the files are
replaced one by one, the small description last, and files of other kinds stay untouched.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from plait.errors import FormatError

Writer = Callable[[Path], None]


def write_folder(path: Path, files: Mapping[str, Writer]) -> Path:
    """Write `files` ({name: writer}) into the folder `path`, the last one replaced last."""
    if path.exists() and not path.is_dir():
        raise FormatError(f"{path} is a file; give a folder to save the adapter in.")
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = _hidden_sibling(path if not path.exists() else path / "adapter")
        try:
            staging.mkdir()
            for name, write in files.items():
                _write(staging / name, write)
            _commit_folder(staging, path, list(files))
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return path


def write_file(path: Path, write: Writer) -> Path:
    """Write one file atomically."""
    if path.is_dir():
        raise FormatError(f"{path} is a folder; give the name of a file.")
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = _hidden_sibling(path)
        try:
            _write(staging, write)
            os.replace(staging, path)
        finally:
            staging.unlink(missing_ok=True)
    return path


def tensors_writer(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> Writer:
    """A writer of a safetensors file; views and tied tensors are stored as tensors of their own."""

    def write(file: Path) -> None:
        from safetensors.torch import save_file

        seen: set[int] = set()
        alone: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            value = tensor.detach().cpu().contiguous()
            storage = value.untyped_storage()
            # safetensors refuses tensors that share memory, or see only part of it.
            if storage.data_ptr() in seen or storage.nbytes() != value.nbytes:
                value = value.clone()
            seen.add(value.untyped_storage().data_ptr())
            alone[name] = value
        save_file(alone, file, metadata=metadata)

    return write


def json_writer(value: Mapping[str, Any]) -> Writer:
    """A JSON object with one line for each entry, and for each item of a list of objects."""
    lines = (f"{json.dumps(k)}: {_json(v)}" for k, v in value.items())
    return text_writer("{\n" + ",\n".join(lines) + "\n}\n")


def _json(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n " + ",\n ".join(json.dumps(v, ensure_ascii=False) for v in value) + "\n]"
    return json.dumps(value, ensure_ascii=False)


def text_writer(text: str) -> Writer:
    def write(file: Path) -> None:
        file.write_text(text, encoding="utf-8")

    return write


def _write(file: Path, write: Writer) -> None:
    file.touch()
    mode = file.stat().st_mode  # what the umask allows; safetensors makes its files private
    write(file)
    file.chmod(mode)
    _flush(file)


def _commit_folder(staging: Path, path: Path, names: list[str]) -> None:
    if not path.exists():
        os.rename(staging, path)
        _flush(path.parent)
        return
    interrupt: KeyboardInterrupt | None = None
    for name in names:
        try:
            os.replace(staging / name, path / name)
        except KeyboardInterrupt as e:  # the files belong together: finish, then obey
            interrupt = e
            os.replace(staging / name, path / name)
    _flush(path)
    if interrupt is not None:
        raise interrupt


def _hidden_sibling(path: Path) -> Path:
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"


def _flush(path: Path) -> None:
    """To the disk, so that a rename cannot become durable before what it names."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of the file system as one line that names what was being saved."""
    try:
        yield
    except OSError as e:
        kept = "; what was there is intact" if path.exists() else ""
        raise FormatError(f"{path} could not be written: {e.strerror or e}{kept}.") from e
    except Exception as e:
        if type(e).__name__ == "SafetensorError":  # safetensors reports a full disk this way
            raise FormatError(f"{path} could not be written: {e}.") from e
        raise
