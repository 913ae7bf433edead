"""The bake-off as one HTML file, readable offline."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plait.evaluation.page import Cell, Folded, Part, Picture, Section, Table, Text, write_page
from plait.study.results import Comparison, Row, size


def write_report(file: Path, found: Comparison) -> Path:
    """Write the report and return its path."""
    count, subject = len(found.rows), found.task["title"] or found.task["name"]
    lead = (
        f"{count} method{'s' if count != 1 else ''} on {subject}, "
        f"{found.task['metric']} on {found.task['test_examples']} held-out examples. Same data, "
        "same seeds, learning rate tuned for each."
    )
    parts: list[Part] = [
        Section("Advice", [Text(found.advice, "good" if found.winner else "")]),
        Section("Scores", [_scores(found), *_picture(found, "score_plot", 660), _how()]),
        Section("Score against cost", [*_picture(found, "pareto_plot"), _costs(found)]),
        Section("Learning rates", [*_picture(found, "rate_plot", 760), _rates(found)]),
        Section("Training loss", _picture(found, "loss_plot")),
        Section("Pair by pair", [_pairs(found)]),
        Section("Budget", [_budget(found)]),
        Section("Settings", [_settings(found)]),
    ]
    return write_page(file, f"Bake-off: {found.task['name']}", parts, lead)


def _scores(found: Comparison) -> Table:
    columns = ["method", found.task["metric"], "95 % interval", "seeds", "against the leader"]
    return Table(
        [*columns, "behind the leader by", "validation loss", "best lr"],
        [_score_row(found, row) for row in found.ranked()]
        + [["base, no adapter", found.base_score, "", None, "", "", None, None]],
    )


def _score_row(found: Comparison, row: Row) -> list[Any]:
    gap = found.gap(row.label)
    tone = {"wins": "good", "worse": "bad", "undecided": "warn"}.get(gap, "")
    behind = None if found.verdict is None else found.verdict.against_leader(row.label)
    return [
        row.label,
        None if row.score is None else row.score.mean,
        _bounds(row.score) if row.score else row.problem or "no finalist",
        len(row.seeds) or None,
        Cell(gap, tone),  # type: ignore[arg-type]
        "" if behind is None else _size_of(behind.interval),
        row.loss,
        "–" if row.lr is None else f"{row.lr:.3g}" + ("\u00a0(edge)" if row.at_edge else ""),
    ]


def _size_of(inside: Any) -> str:
    text = f"{abs(inside.mean):.3g}"
    if math.isnan(inside.low):
        return text
    return _together(f"{text} [{inside.low:.3g}, {inside.high:.3g}]")


def _bounds(inside: Any) -> str:
    if math.isnan(inside.low):
        return "one seed: none"
    return _together(f"{inside.low:.4g} to {inside.high:.4g}")


def _together(text: str) -> str:
    """On one line, however narrow the column."""
    return text.replace(" ", "\u00a0")


def _how() -> Text:
    return Text(
        "Intervals cover what other seeds and other test examples would have given (Student's t "
        "over seeds, each method's scatter steadied by the others'; bootstrap over examples). "
        "Methods are compared pair by pair on the same seeds and examples, so two methods may "
        "differ though their own intervals overlap. “Worse” means that the difference stands after "
        "Holm's correction for all pairs; else it is within noise.",
        "note",
    )


def _costs(found: Comparison) -> Table:
    columns = ["method", "options", "parameters", "file", "ms a step", "start, s", "training, s"]
    rows = [
        [
            row.label,
            ", ".join(f"{k}={v}" for k, v in row.options.items()) or "–",
            "–" if row.parameters is None else f"{row.parameters:,}",
            "–" if row.bytes is None else size(row.bytes),
            None if row.step_seconds is None else round(1000 * row.step_seconds, 1),
            None if row.start_seconds is None else round(row.start_seconds, 2),
            None if row.train_seconds is None else round(row.train_seconds, 1),
            "–" if row.peak_memory is None else size(row.peak_memory),
        ]
        for row in found.ranked()
    ]
    caption = (
        "Medians over seeds. Peak memory is the process's while training, with the base in it; "
        "times are of this machine, with whatever else ran on it."
    )
    return Table([*columns, "peak memory"], rows, caption)


def _rates(found: Comparison) -> Folded:
    rows = [
        [row.label, f"{r['lr']:.3g}", r["state"], r.get("loss"), _rungs(r), r.get("reason", "")]
        for row in found.rows
        for r in row.rates
    ]
    columns = ["method", "lr", "outcome", "validation loss", "on the way", ""]
    return Folded("Every trial", [Table(columns, rows)])


def _rungs(rate: dict[str, Any]) -> str:
    return ", ".join(f"step {s}: {v:.4g}" for s, v in (rate.get("rungs") or {}).items())


def _pairs(found: Comparison) -> Part:
    if found.verdict is None or not found.verdict.differences:
        return Text("There is no pair to compare.", "note")
    rows = [
        [
            d.a,
            d.b,
            abs(d.interval.mean),
            _bounds(d.interval),
            f"{d.p:.2g}",
            f"{d.adjusted:.2g}",
            Cell("yes", "good") if d.significant else "no",
        ]
        for d in found.verdict.differences
    ]
    columns = ["better", "worse", "by", "95 % interval", "p", "p, Holm", "more than noise"]
    return Table(columns, rows)


def _budget(found: Comparison) -> Table:
    plan, spent = found.planned, found.spent
    steps = sorted(set(plan["steps"].values()))
    shown = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}, equal time"
    note = f" ({plan['note']})" if plan["note"] else ""
    total = plan["tune_seconds"] + plan["final_seconds"]
    lost = f"{spent['pruned']} stopped early, {spent['diverged']} diverged"
    rows = [
        ["wall time", _seconds(plan["budget"]), _seconds(spent["seconds"])],
        ["trials and finals, estimated", _seconds(total), ""],
        ["steps of a trial", shown + note, f"{spent['steps trained']:,} in all"],
        ["learning rates a method", plan["trials"], f"{spent['rounds of tuning']} ({lost})"],
        ["finalists", plan["finalists"], sum(row.score is not None for row in found.rows)],
        ["seeds a finalist", plan["seeds"], spent["seeds"]],
        ["trials at once", "", spent["workers"]],
    ]
    return Table(["", "planned", "spent"], [[a, str(b), str(c)] for a, b, c in rows])


def _seconds(value: float) -> str:
    if math.isinf(value):
        return "no limit"
    return f"{value:.0f} s" if value < 180 else f"{value / 60:.1f} min"


def _settings(found: Comparison) -> Folded:
    rows = [[k, str(v)] for k, v in {**found.task, **found.settings}.items() if k != "recipe"]
    return Folded("All of them", [Table(["", ""], rows), _recipe(found)])


def _recipe(found: Comparison) -> Part:
    from plait.evaluation.page import Code

    return Code(found.settings.get("recipe", ""))


def _picture(found: Comparison, name: str, width: int | None = 980) -> list[Part]:
    """A plot, or a word on why there is none."""
    if importlib.util.find_spec("matplotlib") is None:
        return [Text("Plots need matplotlib: pip install 'plait[plots]'.", "note")]
    if not any(row.score is not None or row.rates for row in found.rows):
        return []
    from plait.study import plots

    draw: Callable[[Comparison], bytes] = getattr(plots, name)
    return [Picture(draw(found), alt=name.replace("_", " "), width=width)]
