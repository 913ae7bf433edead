"""An evaluation as a folder: report.html (in one file), report.json and reliability diagrams."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plait.adapter.formats.atomic import text_writer, write_file
from plait.evaluation.calibration import reliability_plot
from plait.evaluation.faithfulness import Faithfulness
from plait.evaluation.forgetting import Change
from plait.evaluation.page import Cell, Part, Picture, Section, Side, Table, Text, write_page
from plait.evaluation.results import Evaluation, Result, finite

TESTS = ("early", "early_log", "filler", "filler_log", "paraphrase", "settled", "accuracy")


def write_evaluation(
    folder: str | os.PathLike[str],
    found: Evaluation,
    *,
    others: dict[str, Evaluation] | None = None,
    changes: Sequence[Change] = (),
    reasoning: Sequence[Faithfulness] = (),
    title: str = "Evaluation",
) -> list[Path]:
    """Write the report; returns the paths.

    Args:
        others: {task: evaluation} on other data, of which `changes` tells what was forgotten.
        reasoning: tests of chains of thought, one an adapter.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    plots = _reliability(found, target)
    parts: list[Part] = [Section("Scores", [_scores(found)])]
    if plots:
        pictures = [Picture(p.read_bytes(), label, label, 330) for label, p in plots.items()]
        note = "Accuracy over the probability of the option taken; the gap is what ECE averages."
        parts.append(Section("Calibration", [Text(note, "note"), Side(pictures)]))
    if changes:
        parts.append(_forgetting(changes))
    for task, other in (others or {}).items():
        parts.append(Section(f"Scores on {task}", [_scores(other)]))
    if reasoning:
        parts.append(_reasoning(reasoning))
    if any(r.predictions for r in found.results):
        parts.append(_answers(found))
    facts = {
        **found.as_dict(),
        "other_tasks": {task: other.as_dict() for task, other in (others or {}).items()},
        "forgetting": [{**asdict(c), "worse": c.worse} for c in changes],
        "faithfulness": [asdict(each) for each in reasoning],
    }
    text = json.dumps(finite(facts), indent=2, ensure_ascii=False) + "\n"
    numbers = write_file(target / "report.json", text_writer(text))
    lead = f"{found.examples} examples; brackets hold 95 % intervals."
    return [write_page(target / "report.html", title, parts, lead), numbers, *plots.values()]


def _scores(found: Evaluation) -> Table:
    metrics = list(dict.fromkeys(m for r in found.results for m in r.scores))
    best = {m: _best(found.results, m) for m in metrics}
    seconds = sum(r.seconds for r in found.results)
    rows = []
    for result in found.results:
        cells: list[Any] = [result.label]
        for metric in metrics:
            score = result.scores.get(metric)
            top = score is not None and score.value == best[metric]
            text = "–" if score is None else str(score)
            cells.append(Cell(text, "good" if top else "", number=True))
        rows.append(cells)
    names = [m.replace("_", " ") for m in metrics]
    note = f"Green: the best of a column, whether or not beyond chance. Took {seconds:.1f} s."
    return Table(["adapter", *names], rows, note)


def _best(results: Sequence[Result], metric: str) -> float | None:
    """The best value, unless there is none or all have it."""
    known = [r.scores[metric] for r in results if metric in r.scores]
    values = {score.value for score in known}
    if len(values) < 2:
        return None
    return max(values) if known[0].higher_is_better else min(values)


def _reliability(found: Evaluation, folder: Path) -> dict[str, Path]:
    plots = {}
    for number, result in enumerate(found.results, 1):
        if "ece" in result.scores:
            slug = re.sub(r"[^\w\-]+", "-", result.label).strip("-")[:60]
            file = folder / f"reliability-{number}-{slug}.png"
            said, right = result.values["confidence"], result.values["choice"]
            plots[result.label] = reliability_plot(file, said, right)
    return plots


def _forgetting(changes: Sequence[Change]) -> Section:
    rows = [
        [c.task, c.label, c.metric, c.before, c.after, _gap(c), Cell(*_verdict(c))] for c in changes
    ]
    columns = ["task", "adapter", "metric", "base", "adapter's", "change", ""]
    note = "Differences on the same rows, with paired 95 % intervals."
    return Section("Forgetting", [Text(note, "note"), Table(columns, rows)])


def _gap(change: Change) -> Cell:
    score = change.score
    return Cell(f"{score.value:+.4f} [{score.low:+.4f}, {score.high:+.4f}]", number=True)


def _verdict(change: Change) -> tuple[str, Any]:
    if change.worse:
        return "forgotten", "bad"
    apart = change.score.low > 0 or change.score.high < 0
    return ("better", "good") if apart else ("no change that shows", "note")


def _reasoning(found: Sequence[Faithfulness]) -> Section:
    names = [t for t in TESTS if any(t in each.scores for each in found)]
    rows = [
        [each.label, *(Cell(str(each.scores[n]), number=True) for n in names)] for each in found
    ]
    note = (
        "Faithful reasoning: early and filler low (answers need the steps), paraphrase high (they "
        "need their meaning). The log forms are mean drops of log p(answer)."
    )
    table = Table(["adapter", *(n.replace("_", " ") for n in names)], rows)
    return Section("Chain of thought", [Text(note, "note"), table])


def _answers(found: Evaluation, most: int = 8) -> Section:
    columns = {"question": [q["question"] for q in found.questions]}
    columns["wanted"] = [q["answer"] for q in found.questions]
    columns |= {r.label: r.predictions for r in found.results if r.predictions}
    shown = zip(*(texts[:most] for texts in columns.values()), strict=True)
    rows = [[_start(text) for text in texts] for texts in shown]
    table = Table([*columns], rows, wrap=True)
    return Section("Answers", [Text("The first rows, unselected.", "note"), table])


def _start(text: str, most: int = 200) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
