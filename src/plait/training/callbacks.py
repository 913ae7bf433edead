"""What a run shows and writes while it goes: progress, log.jsonl, a trial save at step 1."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import TrainerCallback

from plait.errors import PlaitError
from plait.training.report import LOG, append_log, peak_memory, read_log


class Monitor(TrainerCallback):
    """One line of log.jsonl for each logged step, and a progress bar (lines without a terminal)."""

    def __init__(self, output: Path, console: Console, show: bool) -> None:
        self.file, self.console, self.show = output / LOG, console, show
        self.trainer: Any = None
        self.history = read_log(self.file)
        self.before = max((r.get("elapsed", 0.0) for r in self.history), default=0.0)
        self.bar: Progress | None = None
        self.started = self.last = time.perf_counter()
        self.first = self.last_step = self.last_tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = self.last = time.perf_counter()
        self.first = self.last_step = state.global_step
        if self.show and self.console.is_terminal:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn())
            self.bar = Progress(*columns, TextColumn("{task.fields[facts]}"), console=self.console)
            self.task = self.bar.add_task("", total=state.max_steps, facts="")
            self.bar.update(self.task, completed=state.global_step)
            self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            self._record(state, self._training(state, logs))
        elif "eval_loss" in logs:
            self._record(state, {"eval_loss": logs["eval_loss"]})

    def _training(self, state: Any, logs: dict[str, Any]) -> dict[str, Any]:
        if not math.isfinite(logs["loss"]):
            raise PlaitError(
                f"the training loss is {logs['loss']} at step {state.global_step}; start anew with "
                "a lower lr."
            )
        now, tokens = time.perf_counter(), int(self.trainer.tokens)
        steps = state.global_step - self.last_step
        record = {"loss": logs["loss"], "lr": logs["learning_rate"]}
        if "grad_norm" in logs:
            record["grad_norm"] = float(logs["grad_norm"])
        extra, self.trainer.extra = self.trainer.extra, torch.zeros(())
        if extra.any():
            record["extra_loss"] = float(extra) / max(1, steps)
        record["tokens_per_second"] = round((tokens - self.last_tokens) / (now - self.last), 1)
        self.last, self.last_tokens, self.last_step = now, tokens, state.global_step
        return record

    def _record(self, state: Any, values: dict[str, Any]) -> None:
        elapsed = time.perf_counter() - self.started
        done = max(1, state.global_step - self.first)
        record = {
            "step": state.global_step,
            "total": state.max_steps,
            "epoch": round(state.epoch or 0.0, 4),
            **values,
            "elapsed": round(self.before + elapsed, 2),
            "remaining": round(elapsed / done * (state.max_steps - state.global_step), 2),
            "peak_memory": peak_memory(),
        }
        self.history.append(record)
        if state.is_world_process_zero:
            append_log(self.file, record)
            self._show(record)

    def _show(self, record: dict[str, Any]) -> None:
        facts = describe(record)
        if self.bar is not None:
            self.bar.update(self.task, facts=facts)
        elif self.show:
            self.console.print(f"step {record['step']}/{record['total']}  {facts}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def describe(record: dict[str, Any]) -> str:
    """A log record in one line for people."""
    if "eval_loss" in record:
        return f"eval loss {record['eval_loss']:.4f}"
    left = int(record["remaining"])
    return "  ".join(
        (
            f"loss {record['loss']:.4f}",
            f"lr {record['lr']:.2e}",
            f"{record['tokens_per_second']:.0f} tokens/s",
            f"{record['peak_memory'] / 1e9:.2f} GB",
            f"{left // 60}:{left % 60:02d} left",
        )
    )


class TrialSave(TrainerCallback):
    """Saves after the first step and reads back: a full disk shows now, not after a night."""

    def __init__(self, output: Path) -> None:
        self.folder = output / ".trial-save.tmp"
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step != 1 or not state.is_world_process_zero:
            return
        adapter = self.trainer.adapter
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.trainer.save_weights(self.folder)
            if adapter is not None:
                self._compare(adapter)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _compare(self, adapter: Any) -> None:
        from plait.adapter.formats import read_adapter
        from plait.training.checkpoint import ADAPTER

        again = read_adapter(self.folder / ADAPTER).state_dict()
        for name, value in adapter.state_dict().items():
            if not torch.isclose(again[name], value.cpu(), rtol=0, atol=0, equal_nan=True).all():
                raise PlaitError(
                    f"adapter {adapter.name!r}: {name!r} does not come back from "
                    f"{self.folder.parent} as it was saved; check the disk."
                )
