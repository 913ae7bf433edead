"""The table and the plot of the merging benchmark, from the stored lines."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.merging.results import Summary, read_results

from plait.evaluation.labels import name_points

HERE = Path(__file__).parent
TABLE, PLOT = HERE / "RESULTS.md", HERE / "held_in_and_out.png"
REFERENCES = ("base", "own experts", "trained together")
BASELINE = "linear"
sys.path.insert(0, str(HERE.parent / "claims"))

HEAD = """# Every merge method on the same experts

Made by `python -m benchmarks.merging --report` from `benchmarks/results/merging.jsonl`.

Eight LoRAs of rank 8 on all-MiniLM-L6-v2 (22.6 M parameters, 36 linear layers), each trained for
120 steps of 16 rows on one task: intents, sentiment, commands to a smart home, spam, languages,
emoji, books of the Bible, support in comments. An answer is the option whose embedding
by the untouched base is nearest to the text's, so no task has a head and every merge can be asked
every task. Test rows: {rows} of each held-in task, {others} of every other.

Every merge method has {budget} evaluations on {validation} validation rows (of the held-in tasks,
apart from training and test): a factor on the result, and where the method has a knob worth it, two
more values of that. Methods of two inputs merge pairs, then pairs of those. Searches get as many
rows in all. "as it comes" is no tuning; "task known" builds one change for each task and must be
told which it is.

- *held-in*: accuracy over that of the task's own expert, mean of eight tasks; *way*: 0 is the base,
  1 the experts.
- *against linear*: difference of held-in from the tuned weighted sum, with the 95 % interval of the
  paired difference over the eight tasks (one training seed: it says nothing about other experts).
- *held-out*: points of accuracy gained on the base, mean of eight tasks that no expert was trained
  on (other domains, languages, books, labels of the same kinds, and one kind that is new).
- *kept*: accuracy over the base's on five general tasks (goals and steps of instructions, related
  phrases, likenesses, social situations): 1.00 is nothing forgotten.
- CPU seconds of one thread: of one merge, and of tuning with all evaluations.

Settings were fixed before the first run but for three, changed after it: Fisher diagonals are
scaled to one norm an expert (held-in was 0.774 without), Frank-Wolfe's hull is 2.4 times as large
(0.785 without), and LoRA Soups' weights are free (0.804 with a softmax). With 96 test rows a task
and one training seed, differences of a point or two say nothing.
"""


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of the 95 % interval), as in the claims."""
    from lab.verdict import interval as found

    return found(differences)


def table(summary: Summary) -> list[str]:
    """Markdown lines, best held-in first."""
    lines = [
        "| merge | held-in | way | against linear | held-out | kept | data | rank | merge s | "
        "tuning s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    labels = [label for label in summary.lines if label not in REFERENCES]
    labels.sort(key=lambda label: -summary.held_in(label))
    here = [label for label in REFERENCES if label in summary.lines]
    return lines + [_row(summary, label) for label in [*here, *labels]]


def _row(summary: Summary, label: str) -> str:
    line = summary.lines[label]
    cells = [f"*{label}*" if label in REFERENCES else label]
    cells += [f"{summary.held_in(label):.3f}", f"{summary.recovered(label):.2f}"]
    cells += [_against(summary, label), *_elsewhere(summary, label)]
    needs = line.get("needs") or []
    cells += [", ".join(needs), _plain(line.get("rank"))]
    merge = line.get("merge_s")
    cells += ["" if merge is None else f"{merge:.2f}"]
    tuning = line.get("tuning_s")
    cells += ["" if tuning is None else "as it comes" if not tuning else f"{tuning:.0f}"]
    return "| " + " | ".join(cells) + " |"


def _against(summary: Summary, label: str) -> str:
    if label == BASELINE or BASELINE not in summary.lines:
        return ""
    pairs = zip(summary.normalised(label), summary.normalised(BASELINE), strict=True)
    mean, half = interval([a - b for a, b in pairs])
    return f"{mean:+.3f} ± {half:.3f}"


def _elsewhere(summary: Summary, label: str) -> list[str]:
    known = summary.lines[label]["tasks"]
    if not all(name in known for name in summary.tasks("held-out")):
        return ["", ""]
    gained = statistics.fmean(summary.gains(label, "base", "held-out"))
    return [f"{100 * gained:+.1f}", f"{statistics.fmean(summary.kept(label)):.2f}"]


def _plain(value: object) -> str:
    return "" if value is None else str(value)


def growth(found: dict[tuple[str, int], dict]) -> list[str]:  # type: ignore[type-arg]
    """Held-in by the number of experts, for the contenders that ran with several."""
    counts = sorted({count for _, count in found})
    summaries = {count: Summary.of(found, count) for count in counts}
    labels = [
        label
        for label in summaries[counts[-1]].lines
        if label not in REFERENCES and all(s.complete([label]) for s in summaries.values())
    ]
    if len(counts) < 2 or not labels:
        return []
    lines = ["\n## By the number of experts\n", "Held-in, over the tasks of the experts merged.\n"]
    lines += [
        "| merge | " + " | ".join(map(str, counts)) + " |",
        "| --- |" + " --- |" * len(counts),
    ]
    for label in labels:
        cells = [f"{summaries[count].held_in(label):.3f}" for count in counts]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def write_report() -> list[Path]:
    """The table, and the plot if matplotlib is there."""
    found = read_results()
    summary = Summary.of(found)
    any_line = next(line for line in summary.lines.values() if line.get("setting"))
    machine, setting = any_line["machine"], any_line["setting"]
    head = HEAD.format(**setting)
    facts = ", ".join(f"{k} {machine[k]}" for k in ("torch", "transformers") if k in machine)
    dates = sorted({line["machine"]["date"] for line in summary.lines.values()})
    ends = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    parts = [head, f"{ends}, {machine['cpu']}, one thread, {facts}.\n", *table(summary)]
    text = "\n".join([*parts, *growth(found), f"\n![held-in against held-out]({PLOT.name})\n"])
    TABLE.write_text(text, encoding="utf-8")
    return [TABLE, draw(summary)]


def draw(summary: Summary, to: Path = PLOT) -> Path:
    """Held-in against held-out, area by CPU seconds of tuning."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 7))
    names: dict[tuple[float, float], list[str]] = {}
    for label, line in summary.lines.items():
        if label == "own experts" or not all(n in line["tasks"] for n in summary.tasks("held-out")):
            continue
        x = summary.held_in(label)
        y = 100 * statistics.fmean(summary.gains(label, "base", "held-out"))
        names.setdefault((round(x, 3), round(y, 1)), []).append(label)
        seconds = line.get("tuning_s") or 0.0
        reference = label in REFERENCES
        axes.scatter(
            x, y, s=20 + 40 * math.sqrt(seconds), alpha=0.5,
            color="black" if reference else "tab:blue", marker="*" if reference else "o",
        )  # fmt: skip
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.set_xlabel("held-in: accuracy over the experts' (mean of 8 tasks)")
    axes.set_ylabel("held-out: points gained on the base (mean of 8 tasks)")
    axes.set_title("Merges of eight experts; area grows with the CPU seconds of tuning")
    figure.tight_layout()
    # Merges that came out alike share a name.
    name_points(axes, [(x, y, ", ".join(here), "#333333") for (x, y), here in names.items()])
    figure.savefig(to, dpi=110)
    plt.close(figure)
    return to
