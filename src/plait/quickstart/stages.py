"""Stages of a job that remember what they found, so that the same command picks up where it
stopped.

A stage's result is a small JSON file, written whole or not at all. A stage runs when its file
is missing, or was made with other settings.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from plait.adapter.formats.atomic import text_writer, write_file

Facts = dict[str, Any]


class Stages:
    """The results folder of one job."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, settings: Mapping[str, Any], work: Callable[[], Facts]) -> Facts:
        """The stored result of stage `name`, or what `work()` now finds.

        `seconds`, the wall time that the stage took when it ran, is added.
        """
        file = self.folder / f"{name}.json"
        stamp = json.loads(json.dumps(dict(settings), default=str))
        if file.is_file():
            stored = json.loads(file.read_text(encoding="utf-8"))
            if stored.get("settings") == stamp:
                self.say(f"{name}: done before ({stored['facts']['seconds']:.0f} s)")
                return stored["facts"]
        self.say(f"{name} ...")
        start = time.perf_counter()
        facts = work()
        facts["seconds"] = round(time.perf_counter() - start, 2)
        text = json.dumps({"settings": stamp, "facts": facts}, ensure_ascii=False)
        write_file(file, text_writer(text))
        return facts
