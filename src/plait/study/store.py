"""The folder of a bake-off: settings, plan, and one JSON file for every finished trial.

Every file appears whole, under its name, or not at all; so a bake-off that was killed loses the
trials that were running and nothing else.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.adapter.formats.atomic import text_writer, write_file
from plait.errors import PlaitError
from plait.study.job import Job, Record

SETTINGS, PLAN, TRIALS, ADAPTERS = "settings.json", "plan.json", "trials", "adapters"


class Store:
    """Args:
    folder: made where it is missing.
    settings: everything that outcomes depend on; another bake-off's folder is refused.
    restart: remove what an earlier one left.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], restart: bool = False) -> None:
        self.folder = folder
        if restart:
            self._clear()
        wanted = json.loads(json.dumps(settings, default=str))
        known = self._read(SETTINGS)
        if known is None:
            self._write(SETTINGS, wanted)
        elif known != wanted:
            keys = [k for k in wanted if known.get(k) != wanted[k]] or ["settings"]
            raise PlaitError(
                f"{folder} holds a bake-off with another {', '.join(keys)}; give another output, "
                "or start anew with --restart."
            )
        self.records: dict[str, Record] = {}
        for file in sorted((folder / TRIALS).glob("*.json")):
            record = json.loads(file.read_text(encoding="utf-8"))
            self.records[record["key"]] = record

    def find(self, job: Job) -> Record | None:
        return self.records.get(job.key)

    def keep(self, record: Record) -> None:
        """Remember a trial; what ran out of time is not one."""
        if record["state"] == "stopped":
            return
        self.records[record["key"]] = record
        name = f"{record['kind']}-{record['key']}.json"
        self._write(f"{TRIALS}/{name}", record)

    def plan(self) -> dict[str, Any] | None:
        return self._read(PLAN)

    def keep_plan(self, plan: Mapping[str, Any]) -> None:
        self._write(PLAN, plan)

    def write(self, name: str, value: Any) -> Path:
        """A result as JSON; what is not finite becomes null."""
        return self._write(name, value)

    def _read(self, name: str) -> Any:
        file = self.folder / name
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def _write(self, name: str, value: Any) -> Path:
        text = json.dumps(finite(value), ensure_ascii=False, indent=1, allow_nan=False)
        return write_file(self.folder / name, text_writer(text + "\n"))

    def _clear(self) -> None:
        for name in (SETTINGS, PLAN, "comparison.json", "report.html"):
            (self.folder / name).unlink(missing_ok=True)
        for name in (TRIALS, ADAPTERS):
            shutil.rmtree(self.folder / name, ignore_errors=True)


def finite(value: Any) -> Any:
    """JSON knows neither infinity nor NaN."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
