"""Spoken commands of a smart home, in English or German: which intent is meant?

Sentences sampled from templates, those of the test set from other templates than the training
set's (the rows' key `part` says which); the same rows as the quickstart's. Needs the extra `demo`.
Licence: Apache-2.0 (home-assistant-intents; sampled with hassil, Apache-2.0).
Package: pip home-assistant-intents.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Literal

from benchmarks.tasks.archive import Say, tasks_home
from benchmarks.tasks.rows import Row, choice

NAME = "home"
Language = Literal["en", "de"]


def fetch(say: Say | None = None, language: Language = "en") -> Path:
    """The folder with train.jsonl and test.jsonl, made on first use."""
    folder = tasks_home() / f"{NAME}-{language}"
    if not folder.is_dir():
        if say is not None:
            say("sampling sentences (about 10 s)")
        _make(folder, language)
    return folder


def _make(folder: Path, language: Language) -> None:
    try:
        from plait.quickstart.tasks import TASKS
    except ImportError as error:
        raise RuntimeError(f"{NAME} needs the extra demo: pip install 'plait[demo]'") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        TASKS[f"home_{language}"].make(work)
        if not folder.is_dir():
            os.rename(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def rows(language: Language = "en") -> list[Row]:
    """Commands, asking for the intent."""
    known = []
    for part in ("train", "test"):
        lines = (fetch(language=language) / f"{part}.jsonl").read_text(encoding="utf-8")
        for line in lines.splitlines():
            *_, user, assistant = json.loads(line)["messages"]
            known.append((user["content"], json.loads(assistant["content"])["intent"], part))
    intents = sorted({intent for _, intent, _ in known})
    return [choice(text, intents, intent, part=part) for text, intent, part in known]
