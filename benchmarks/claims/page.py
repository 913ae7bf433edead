"""docs/claims.md from the stored results: what papers claim, what we found.

python benchmarks/claims/page.py
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from lab.store import RESULTS

DOCS = Path(__file__).parents[2] / "docs"
MARKS = {"shown": "●", "not shown at this scale": "○", "contradicted": "✕"}
HEAD = """# What papers claim, and what we found

Every system here states something about itself. Each statement was tried small, by a script that
anyone can run: `python benchmarks/claims/<name>.py`. Contenders, tasks, learning rates (at least
four for every side) and the rule of judgement were fixed before the run. Every side's rate is tuned
by validation loss (with six labels a class: by accuracy) with one seed, with up to two rates more
where the edge was best; figures are on test data, mean ± standard deviation over seeds.

*shown*: the 95 % interval of the paired difference lies on the claim's side. *contradicted*: it
lies on the other side. *not shown at this scale*: it covers both. Our tasks are tiny beside the
papers' (a digits transformer where they took LLaMA), so a claim not shown here may well hold there.

Claims of merges are judged together, on one table of eight experts of a real encoder
(`benchmarks/merging/RESULTS.md`); their intervals are paired over the tasks.
"""


def load() -> list[dict[str, Any]]:
    """Every stored result, by name."""
    return [json.loads(f.read_text(encoding="utf-8")) for f in sorted(RESULTS.glob("*.json"))]


def page(results: list[dict[str, Any]]) -> str:
    """The whole page."""
    count = {mark: sum(r["outcome"] == mark for r in results) for mark in MARKS}
    tally = ", ".join(f"{number} {outcome}" for outcome, number in count.items())
    rows = ["| system | claim | verdict |", "| --- | --- | --- |"]
    rows += [
        f"| [{r['slug']}](#{r['slug']}) | {r['statement']} | {MARKS[r['outcome']]} {r['outcome']} |"
        for r in results
    ]
    table = "\n".join(rows)
    return "\n".join([HEAD, f"{tally}.\n", table, *(section(r) for r in results)]) + "\n"


def section(r: dict[str, Any]) -> str:
    """One claim: setting, figures, verdict."""
    parts = [f"\n## {r['slug']}\n", f"{r['paper']}. Claim: {r['statement']}.\n"]
    if r["task"]:
        parts.append(f"Setting: {r['task']}; {r['steps']} steps, seeds {r['seeds']}.")
    if r["note"]:
        parts.append(r["note"])
    if r["contenders"]:
        parts += ["", "| contender | parameters | tuned rate | test loss | test accuracy |"]
        parts.append("| --- | --- | --- | --- | --- |")
        parts += [row(label, side) for label, side in r["contenders"].items()]
    # The figures of a comparison stand in the reason already.
    if r["measured"] and not any(name.endswith(": gain") for name in r["measured"]):
        parts.append("\nMeasured: " + ", ".join(_figure(*item) for item in r["measured"].items()))
    parts.append(f"\n**{r['outcome'].capitalize()}.** {r['reason']}")
    parts.append(f"`benchmarks/claims/{r['slug'].replace('-', '_')}.py`, {r['seconds']:.0f} CPU s.")
    return "\n".join(parts)


def row(label: str, side: dict[str, Any]) -> str:
    """A contender's line."""
    tests = [trial["test"] for trial in side["trials"]]
    cells = [_spread([t[metric] for t in tests]) for metric in ("loss", "accuracy")]
    return f"| {label} | {side['parameters']:,} | {side['rate']:g} | {cells[0]} | {cells[1]} |"


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {deviation:.3f}"


def _figure(name: str, value: Any) -> str:
    return (
        f"{name.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
    )


def main() -> None:
    text = page(load())
    target = DOCS / "claims.md"
    if "--check" in sys.argv:
        raise SystemExit(
            0 if target.read_text(encoding="utf-8") == text else "docs/claims.md is old"
        )
    target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
