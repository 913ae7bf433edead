"""Merges whose writing of shards is stopped, or watched."""

from __future__ import annotations

from typing import Any

import pytest

from plait.merging import engine

REAL = engine._write_one


def stopped_after(count: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The shards that are written before a Ctrl-C comes at the next one."""
    written: list[int] = []

    def write(job: Any, index: int) -> None:
        if len(written) == count:
            raise KeyboardInterrupt
        written.append(index)
        REAL(job, index)

    monkeypatch.setattr(engine, "_write_one", write)
    return written


def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The shards that are written from here on."""
    written: list[int] = []

    def write(job: Any, index: int) -> None:
        written.append(index)
        REAL(job, index)

    monkeypatch.setattr(engine, "_write_one", write)
    return written
