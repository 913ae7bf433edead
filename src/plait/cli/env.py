"""`plait env`: a block to paste into a bug report."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import typer

from plait.cli.common import examples

PACKAGES = (
    *("torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy"),
    *("trl", "datasets", "matplotlib", "peft", "gguf", "triton"),
)


def env() -> None:
    """Print versions, processor, memory and devices, for a bug report."""
    import plait
    from plait.training.bases import list_bases, plait_home

    rows = [
        ("plait", plait.__version__),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("system", platform.platform()),
        ("processor", f"{_processor()}, {os.cpu_count()} threads seen, {_usable()} usable"),
        ("memory", _memory()),
        *((name, _version(name)) for name in PACKAGES),
        *_torch_rows(),
        ("bases", ", ".join(b.name for b in list_bases() if b.on_disk) or "none on disk"),
        ("home", str(plait_home())),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name.ljust(width)}  {value}")


def _version(name: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _usable() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = {
            name: int(rest.split()[0]) for name, _, rest in (r.partition(":") for r in lines)
        }
        return (
            f"{kilobytes['MemTotal'] / 1e6:.1f} GB, {kilobytes['MemAvailable'] / 1e6:.1f} GB free"
        )
    except (OSError, KeyError, ValueError, IndexError):
        return "unknown"


def _torch_rows() -> list[tuple[str, str]]:
    import torch

    rows = [
        (
            "torch build",
            f"cuda {torch.version.cuda}, cpu {torch.backends.cpu.get_cpu_capability()}",
        ),
        ("torch threads", str(torch.get_num_threads())),
    ]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(i)
            rows.append((f"gpu {i}", f"{facts.name}, {facts.total_memory / 1e9:.1f} GB"))
    else:
        mps = hasattr(torch.backends, "mps") and torch.backends.mps.is_available()
        rows.append(("gpu", "Apple MPS" if mps else "none"))
    return rows


def add(app: typer.Typer) -> None:
    app.command(
        short_help="Versions and devices, for a bug report.",
        epilog=examples("plait env", "plait env | xclip"),
    )(env)
