"""From the stored outcomes to docs/which-method.md and its picture."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any

from plait.evaluation.figures import new_figure
from plait.study.results import Comparison
from plait.study.store import finite

RESULTS = Path(__file__).parents[1] / "results" / "which-method"
Outcome = dict[str, Any]


def summary(found: Comparison, threads: int) -> Outcome:
    """What is published of a bake-off: all but the curves."""
    rows = []
    for row in found.ranked():
        behind = None if found.verdict is None else found.verdict.against_leader(row.label)
        rows.append(
            {
                "label": row.label,
                "options": row.options,
                "score": row.score and [row.score.mean, row.score.low, row.score.high],
                "behind": behind
                and [behind.interval.mean, behind.interval.low, behind.interval.high],
                "gap": found.gap(row.label),
                "lr": row.lr,
                "rates": [[r["lr"], r.get("loss"), r["state"]] for r in row.rates],
                **{k: getattr(row, k) for k in ("parameters", "bytes", "step_seconds", "at_edge")},
                "problem": row.problem,
            }
        )
    facts = {"task": found.task, "rows": rows, "base": found.base_score, "advice": found.advice}
    made = {"date": date.today().isoformat(), "machine": machine(threads)}
    plan = {k: found.planned[k] for k in ("steps", "trials", "seeds", "budget")}
    plan["seconds"] = found.spent["seconds"]
    tied = [] if found.verdict is None else found.verdict.tied
    return finite({**facts, **made, "plan": plan, "winner": found.winner, "tied": tied})


def machine(threads: int) -> str:
    import torch

    cores = f"{os.cpu_count()} cores, {threads} thread{'s' if threads != 1 else ''}"
    return f"{platform.system()} {platform.machine()}, {cores}, torch {torch.__version__}"


def mean_ranks(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """{method: mean rank} of those that were scored everywhere; methods told apart from the leader
    by noise alone all rank first."""
    ranks: dict[str, list[float]] = {}
    for outcome in outcomes:
        scored = [r for r in outcome["rows"] if r["score"] is not None]
        first = [r["label"] for r in scored if r["label"] in outcome["tied"]]
        for place, row in enumerate(scored, 1):
            shared = (1 + len(first)) / 2 if row["label"] in first else place
            ranks.setdefault(row["label"], []).append(shared)
    return {n: mean(r) for n, r in ranks.items() if len(r) == len(outcomes)}


def write_page(results: Path, docs: Path) -> Path:
    """The page of all stored outcomes; PlaitError where there is none."""
    files = sorted(results.glob("*.json"))
    if not files:
        raise SystemExit(f"{results} holds no outcome; run the bake-offs first.")
    outcomes = [json.loads(f.read_text(encoding="utf-8")) for f in files]
    docs.mkdir(parents=True, exist_ok=True)
    draw(outcomes, docs / "which-method.png")
    page = docs / "which-method.md"
    page.write_text("\n".join(_page(outcomes)) + "\n", encoding="utf-8")
    return page


def _page(outcomes: Sequence[Outcome]) -> list[str]:
    lines = [
        "# Which method?",
        "",
        "Made by `python -m benchmarks.which_method` with `plait compare`: the same data, steps, "
        "parameters (as nearly as the formulas allow) and seeds for every method, the learning "
        "rate tuned for each on validation data, scores on test data by seeds that tuned nothing. "
        "“First” are the leader and all that differ from it within noise (paired seeds and "
        "examples, 95 %, Holm's correction over all pairs). How far seeds scatter was first judged "
        "pair by pair; after digits and intent had been looked at, it was steadied by all pairs "
        "(`study/spread.py`) for every task. Times are of a machine that did other work too.",
        "",
        "![Scores of every method on every task](which-method.png)",
        "",
    ]
    lines += _overview(outcomes)
    for outcome in outcomes:
        lines += _task(outcome)
    return lines


def _overview(outcomes: Sequence[Outcome]) -> list[str]:
    shared = [o for o in outcomes if len(o["rows"]) == max(len(p["rows"]) for p in outcomes)]
    ranks = mean_ranks(shared)
    names = [o["task"]["name"] for o in shared]
    lines = [f"Over {', '.join(names)}:", "", "| method | mean rank | first on | step, x LoRA |"]
    lines.append("| --- | --- | --- | --- |")
    for label in sorted(ranks, key=lambda n: ranks[n]):
        first = sum(label in o["tied"] for o in shared)
        slow = [_ratio(o, label) for o in shared]
        known = [s for s in slow if s is not None]
        cost = f"{math.exp(mean(math.log(s) for s in known)):.2f}" if known else "–"
        lines.append(f"| `{label}` | {ranks[label]:.1f} | {first} of {len(shared)} | {cost} |")
    return [*lines, ""]


def _ratio(outcome: Outcome, label: str) -> float | None:
    steps = {r["label"]: r["step_seconds"] for r in outcome["rows"]}
    if not steps.get(label) or not steps.get("lora"):
        return None
    return steps[label] / steps["lora"]


def _task(outcome: Outcome) -> list[str]:
    task, plan = outcome["task"], outcome["plan"]
    steps, metric = sorted(set(plan["steps"].values())), task["metric"]
    time = ""
    if plan.get("budget") is not None:
        time = f" Took {plan['seconds'] / 60:.1f} minutes of a budget of {plan['budget'] / 60:g}."
    lines = [
        f"## {task['title'][:1].upper() + task['title'][1:]}",
        "",
        outcome["advice"],
        "",
        f"{metric[:1].upper() + metric[1:]} on {task['test_examples']} test examples; "
        f"{steps[0]} steps, {plan['trials']} learning rates, {plan['seeds']} seeds; base alone "
        f"{outcome['base']:.3g}.{time} {outcome['date']}, {outcome['machine']}.",
        "",
        f"| method | {metric} | against the leader | behind by | lr | parameters | ms/step |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    return [*lines, *(_row(row) for row in outcome["rows"]), ""]


def _row(row: dict[str, Any]) -> str:
    if row["score"] is None:
        return f"| `{row['label']}` | {row['problem'] or 'not scored'} | | | | | |"
    score, behind = (_interval(row[k]) for k in ("score", "behind"))
    rate = f"{row['lr']:.2g}" + (" (edge)" if row["at_edge"] else "")
    step = f"{1000 * row['step_seconds']:.0f}" if row["step_seconds"] else "–"
    cells = (f"`{row['label']}`", score, row["gap"], behind, rate, f"{row['parameters']:,}", step)
    return f"| {' | '.join(cells)} |"


def _interval(values: Sequence[float | None] | None) -> str:
    if not values:
        return ""
    middle, low, high = values
    return f"{middle:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


def draw(outcomes: Sequence[Outcome], file: Path) -> None:
    """One panel a task: scores with intervals, those within noise of the leader in colour."""
    most = max(len(o["rows"]) for o in outcomes)
    figure = new_figure(3.1 * len(outcomes), 1 + 0.27 * most)
    panels = figure.subplots(1, len(outcomes), squeeze=False)[0]
    for axes, outcome in zip(panels, outcomes, strict=True):
        rows = [r for r in outcome["rows"] if r["score"] is not None][::-1]
        for place, row in enumerate(rows):
            middle, low, high = row["score"]
            colour = "#3b6fb6" if row["label"] in outcome["tied"] else "#b9c0cc"
            if low is not None:
                axes.plot([low, high], [place, place], color=colour, lw=2.5)
            axes.plot(middle, place, "o", color=colour, ms=6, mec="white")
        axes.axvline(outcome["base"], color="#8a8f98", lw=1, ls="--")
        axes.set_yticks(range(len(rows)), [r["label"] for r in rows], fontsize=8)
        axes.set_title(f"{outcome['task']['name']}: {outcome['task']['metric']}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)
