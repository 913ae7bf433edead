"""BIG-bench: some of its JSON tasks, read from the package's source archive (358 MB, not kept).

`rows("intent_recognition")`, `rows("multiemo/products_sentence_de")`, ... The option of greatest
target score is the answer. Only the tasks of `WANTED` are kept (about 160 MB of 1.8 GB).
Licence: the package states none; the project is published under Apache-2.0, and single tasks derive
from other collections under their own terms. Every file asks not to be trained on by general
models: train demonstrations only, and pass on neither rows nor adapters as general-purpose.
Package: pip bigbench 1.0.0; Srivastava et al., 2022, arXiv 2206.04615.
"""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks.tasks.archive import Archive, Say, unpacked
from benchmarks.tasks.rows import Row, choice

NAME = "bigbench"
ARCHIVE = Archive(
    "pip",
    "bigbench==1.0.0",
    358_249_635,
    "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
)
WANTED = (
    "multiemo/products_sentence_*",
    "multiemo/hotels_sentence_en",
    "analytic_entailment",
    "arithmetic/*",
    "dark_humor_detection",
    "disfl_qa",
    "elementary_math_qa/question_only",
    "emoji_movie",
    "epistemic_reasoning",
    "figure_of_speech_detection",
    "goal_step_wikihow/*",
    "hinglish_toxicity",
    "human_organs_senses",
    "implicatures",
    "intent_recognition",
    "irony_identification",
    "linguistic_mappings/*_json",
    "list_functions/*",
    "metaphor_boolean",
    "movie_recommendation",
    "phrase_relatedness",
    "qa_wikidata",
    "semantic_parsing_spider",
    "similarities_abstraction",
    "snarks",
    "social_iqa",
    "social_support",
    "sports_understanding",
    "strategyqa",
    "unit_conversion/different_systems",
    "vitaminc_fact_verification",
    "winowhy",
    "word_unscrambling",
)
_BEFORE = "bigbench-1.0.0/bigbench/benchmark_tasks/"


def fetch(say: Say | None = None) -> Path:
    """The folder of task files."""
    return unpacked(NAME, ARCHIVE, keep, say)


def keep(member: str) -> str | None:
    """Where a member goes: `<task>.json`."""
    if not (member.startswith(_BEFORE) and member.endswith("/task.json")):
        return None
    task = member[len(_BEFORE) : -len("/task.json")]
    return f"{task}.json" if any(fnmatch(task, pattern) for pattern in WANTED) else None


def names() -> list[str]:
    """The tasks that have rows of their own (folders of subtasks have none)."""
    folder = fetch()
    found = [f.relative_to(folder).as_posix()[: -len(".json")] for f in folder.rglob("*.json")]
    return sorted(n for n in found if n != "manifest" and "examples" in _read(folder, n))


def rows(task: str) -> list[Row]:
    """The rows of one task."""
    found = _read(fetch(), task)
    return [_row(example) for example in found["examples"]]


def _read(folder: Path, task: str) -> dict[str, Any]:
    file = folder / f"{task}.json"
    if not file.is_file():
        raise FileNotFoundError(f"BIG-bench task {task!r} is not in {folder}; see WANTED")
    return json.loads(file.read_text(encoding="utf-8"))


def _row(example: dict[str, Any]) -> Row:
    scores = example.get("target_scores")
    if scores:
        return choice(example["input"], list(scores), max(scores, key=lambda k: scores[k]))
    target = example["target"]
    answers = [target] if isinstance(target, str) else [str(t) for t in target]
    row: Row = {"prompt": example["input"], "completion": answers[0]}
    return row | {"answers": answers} if len(answers) > 1 else row
