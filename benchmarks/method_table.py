"""benchmarks/METHODS.md and docs/methods.png: the table and the plot of what `methods.py` found."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from plait.evaluation.labels import name_points

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TABLE, PLOT = HERE / "METHODS.md", HERE.parent / "docs" / "methods.png"

HEAD = """# Every method on one model

Made by `python benchmarks/methods.py`; figures are this machine's, ratios carry over.

A step is forward, backward and AdamW, with the method's own rule where it has one, in CPU seconds
of one thread. **Step** is relative to LoRA r=8 in the same rounds (median of paired ratios), at
the method's defaults and at LoRA r=8's number of parameters where one integer option brings it
there within 8 % ("=" where the defaults do). A rule stands for LoRA r=8 under it. **Extra** is what
the method adds to the frozen base's step, beyond its own matrix products (counted in
multiplications and additions, of whichever library needs fewer), as a share of what PEFT's form
adds beyond them: below 0.5 is less than half. "Products" are those counts relative to the base's,
"start" is the part of attaching that goes into start values. Peak memory is of a process with one
contender. `lora`, `lora-plus`, `olora` and `lawa` take the very same step at their defaults: how
far their figures lie apart is what the machine's noise does to all of them.
"""
RULES = """
Rules over plain AdamW on the same weights (LoRA r=8's, or all of the base's): the step, and what a
process needs at its peak beyond AdamW's.

| rule | step over AdamW's | peak beyond AdamW's |
|---|---|---|"""
COLUMNS = (
    "method | parameters | file | step | at LoRA's budget | PEFT's step | extra, of PEFT's"
    " | products | peak (PEFT) | attach (PEFT) | start"
)


def read_results(model: str) -> dict[str, dict[str, Any]]:
    """{method: its last good line}."""
    path = RESULTS / f"methods-{model}.jsonl"
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    return {line["method"]: line for line in lines if "error" not in line}


def write_report() -> list[Path]:
    """Both files, from all models that have results; the plot shows the real model if it is there.

    Returns the paths written.
    """
    models = sorted(p.stem.removeprefix("methods-") for p in RESULTS.glob("methods-*.jsonl"))
    found = {m: lines for m in reversed(models) if (lines := read_results(m))}
    TABLE.write_text("\n".join([HEAD, *(_section(m, lines) for m, lines in found.items())]))
    if not found:
        return [TABLE]
    plot(next(iter(found.values())), PLOT)
    return [TABLE, PLOT]


def _section(model: str, lines: dict[str, dict[str, Any]]) -> str:
    first = next(iter(lines.values()))
    rounds = " or ".join(str(n) for n in sorted({line["rounds"] for line in lines.values()}))
    setting = f"{first['rows']} x {first['tokens']} tokens, float32, {rounds} rounds"
    machine = first["machine"]
    versions = ", ".join(f"{p} {machine[p]}" for p in ("torch", "peft", "plait") if p in machine)
    rule = "|".join(["---"] * (COLUMNS.count("|") + 1))
    rows = [_row(line) for line in sorted(lines.values(), key=lambda line: line["method"])]
    note = f"{machine['date']}, {machine['cpu']}, {versions}; {setting}."
    table = [f"## {model}\n", note + "\n", f"| {COLUMNS} |", f"| {rule} |", *rows]
    return "\n".join([*table, *_rules(lines), ""])


def _rules(lines: dict[str, dict[str, Any]]) -> list[str]:
    """The table of bare rules, each beside AdamW on what it trains."""
    rows, lora = [], lines.get("lora", {}).get("default", {}).get("peak_mb")
    for name, line in sorted(lines.items()):
        if line["axis"] != "rule":
            continue
        own, base = line["default"], line.get("full")
        ratio = own["over_lora"] if base is None else own.get("over_full")
        reference = lora if base is None else base.get("peak_mb")
        known = reference is not None and own.get("peak_mb") is not None
        beyond = f"{own['peak_mb'] - reference:+,.0f} MB" if known else ""
        rows.append(f"| `{name}` | {_ratio(ratio)} | {beyond} |")
    return [RULES, *rows] if rows else []


def _row(line: dict[str, Any]) -> str:
    own, budget, peft = line["default"], line.get("budget"), line.get("peft", {})
    cells = [
        f"`{line['method']}`",
        _count(own["parameters"]),
        _count(own.get("file_bytes"), "B"),
        f"{own['over_lora']:.2f}",
        _at_budget(line, budget),
        _ratio(peft.get("over_lora")),
        _ratio(extra(line)),
        f"{own['flops'] / line['bound']['flops'] - 1:+.1%}",
        _megabytes(own.get("peak_mb"), peft.get("peak_mb")),
        _seconds(own.get("attach_s"), peft.get("attach_s")),
        _seconds(own.get("start_s")),
    ]
    return "| " + " | ".join(cells) + " |"


def _at_budget(line: dict[str, Any], budget: dict[str, Any] | None) -> str:
    lora = line["lora"]["parameters"]
    if abs(line["default"]["parameters"] - lora) <= 0.08 * lora:
        return "="
    if not budget or "over_lora" not in budget:
        return ""
    knob = ", ".join(f"{k} {v}" for k, v in budget["options"].items())
    return f"{budget['over_lora']:.2f} ({knob}: {_count(budget['parameters'])})"


def extra(line: dict[str, Any]) -> float | None:
    """Plait's step beyond the base's and the method's products, as a share of PEFT's."""
    own, peft, base = line["default"], line.get("peft", {}), line["bound"]
    if "over_bound" not in peft:
        return None
    products = min(own["flops"], peft["flops"]) / base["flops"]
    beyond = peft["over_bound"] - products
    return (own["over_bound"] - products) / beyond if beyond > 0.005 else None


def _count(number: float | None, unit: str = "") -> str:
    if number is None:
        return ""
    size = 0 if number < 1000 else min(3, int(math.log10(number) // 3))
    digits = f"{number / 1000**size:.3g}"
    return f"{digits} {' kMG'[size].strip()}{unit}".strip()


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _megabytes(own: float | None, peft: float | None) -> str:
    beside = "" if peft is None else f" ({peft:,.0f})"
    return "" if own is None else f"{own:,.0f} MB{beside}"


def _seconds(own: float | None, peft: float | None = None) -> str:
    beside = "" if peft is None else f" ({peft:.2f})"
    return "" if own is None else f"{own:.2f} s{beside}"


# -- the plot -------------------------------------------------------------------------------------


COLOURS = {
    "parameterisation": "#2a6f97",
    "initialisation": "#6a994e",
    "rule": "#bc6c25",
    "routing": "#9d4edd",
}


TICKS = (0.5, 0.7, 0.8, 0.9, 1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100)


def plot(lines: dict[str, dict[str, Any]], path: Path) -> None:
    """Parameters against step time; PEFT's form, where there is one, is a ring on a thin line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 7.5))
    places = []
    for line in sorted(lines.values(), key=lambda line: line["default"]["over_lora"]):
        own, peft, colour = line["default"], line.get("peft", {}), COLOURS[line["axis"]]
        x, y = own["parameters"], own["over_lora"]
        axes.plot(x, y, "o", color=colour, markersize=6, zorder=3)
        if "over_lora" in peft:
            axes.plot([x, x], [y, peft["over_lora"]], color=colour, linewidth=0.7, alpha=0.5)
            axes.plot(x, peft["over_lora"], "o", mfc="white", mec=colour, markersize=5, zorder=2)
        places.append((x, y, line["method"], colour))
    axes.set(xscale="log", yscale="log")
    axes.set(xlabel="trainable parameters", ylabel="training step, LoRA r=8 = 1")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_yticks([t for t in TICKS if axes.get_ylim()[0] <= t <= axes.get_ylim()[1]])
    axes.axhline(1.0, color="#888888", linewidth=0.8, linestyle=":")
    axes.grid(alpha=0.2)
    name_points(axes, places)
    kinds = [k for k in COLOURS if any(line["axis"] == k for line in lines.values())]
    handles = [plt.Line2D([], [], color=COLOURS[k], marker="o", linestyle="") for k in kinds]
    handles.append(plt.Line2D([], [], color="#555555", marker="o", mfc="white", linestyle=""))
    axes.legend(handles, [*kinds, "the same in PEFT"], frameon=False)
    first = next(iter(lines.values()))
    axes.set_title(f"{first['model']}, {first['rows']} x {first['tokens']} tokens, defaults")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
