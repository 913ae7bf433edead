"""What a run leaves to read: log.jsonl, loss.png, and the `Result` that `train` returns."""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from plait.adapter import Adapter
from plait.training.parity import Parity

LOG = "log.jsonl"


@dataclass
class Result:
    """What came of a run. `adapter` is None after full training (`method: none`)."""

    model: Any
    adapter: Adapter | None
    output: Path
    steps: int
    loss: float
    """Mean training loss over the last tenth of the log."""
    eval_loss: float | None
    seconds: float
    tokens: int
    """Training tokens seen by this process, padding excluded."""
    history: list[dict[str, Any]] = field(default_factory=list, repr=False)
    parity: Parity | None = None
    exports: dict[str, str] = field(default_factory=dict)
    """{format: folder, or why it was not written}."""


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl; a last line that was cut off by a kill is left out."""
    records: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return records


def cut_log(path: Path, step: int) -> list[dict[str, Any]]:
    """Forget what a killed run logged after the checkpoint it resumes from."""
    kept = [r for r in read_log(path) if r.get("step", 0) <= step]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
    return kept


def append_log(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")


def final_loss(history: list[dict[str, Any]]) -> float:
    """Mean of the last tenth of the logged training losses (at least one)."""
    losses = [r["loss"] for r in history if "loss" in r]
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail) if tail else float("nan")


def plot_losses(history: list[dict[str, Any]], file: Path) -> bool:
    """Training and evaluation loss over steps as a picture; False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o--")):
        points = [(r["step"], r[key]) for r in history if key in r]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    figure.savefig(file, dpi=120)
    return True


def peak_memory() -> int:
    """Bytes: the GPU allocator's peak where there is one, else the process's resident peak."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
