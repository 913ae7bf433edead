"""One HTML file, readable offline: scores, curves, norms, answers, checks."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

from plait.adapter.formats.atomic import text_writer, write_file
from plait.quickstart.plots import MERGED, loss_plot, norm_plot, score_plot

STYLE = """
:root { --ink: #1d2433; --soft: #5b6577; --line: #dfe3ea; --good: #0a7f5a; --panel: #f6f7f9; }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); margin: 0 auto; max-width: 60rem;
  padding: 2rem 1.25rem 5rem; }
h1 { font-size: 1.9rem; margin: 0 0 .25rem; } h2 { font-size: 1.25rem; margin: 2.75rem 0 .5rem; }
p.lead, .note { color: var(--soft); } .note { font-size: .9rem; }
table { border-collapse: collapse; width: 100%; margin: .75rem 0; font-variant-numeric:
tabular-nums; } th, td { text-align: left; padding: .45rem .6rem; border-bottom: 1px solid
var(--line); } th { font-weight: 600; color: var(--soft); font-size: .85rem; } td.n, th.n {
text-align: right; } td small { color: var(--soft); } .good { color: var(--good); font-weight: 600;
} img { width: 100%; height: auto; display: block; }
code, pre { font: .85rem/1.5 ui-monospace, monospace; }
pre { background: var(--panel); padding: .8rem 1rem; border-radius: 6px; overflow-x: auto; }
.answers { table-layout: fixed; } .answers td { vertical-align: top; font-size: .9rem; }
.answers code { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .75rem; }
"""


def write_report(folder: Path, facts: dict[str, Any]) -> Path:
    """Write `report.html` into `folder` and return its path."""
    parts = [
        _head(facts),
        _scores(facts),
        _figure(
            "Training loss", loss_plot(facts), "Loss on the answers' tokens, every second step."
        ),
        _figure(
            "Where the adapters changed the model",
            norm_plot(facts),
            "Frobenius norm of dW at every site; one panel an adapter, layers from left to right.",
        ),
        _answers(facts),
        _checks(facts),
        _cost(facts),
        _next(folder),
    ]
    body = "\n".join(parts)
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Plait quickstart</title><style>{STYLE}</style><body>{body}</body></html>"
    )
    report = folder / "report.html"
    write_file(report, text_writer(page))
    return report


def _head(facts: dict[str, Any]) -> str:
    count = sum(t["parameters"] for t in facts["train"].values()) // max(len(facts["train"]), 1)
    return (
        "<h1>Plait quickstart</h1>"
        f"<p class='lead'>{len(facts['train'])} LoRA adapters on {_e(facts['job']['base'])}, "
        f"{count:,} trained numbers each, and one merge of them. Nothing that is tested "
        "was trained on; test commands come from sentence templates that training never saw.</p>"
    )


def _scores(facts: dict[str, Any]) -> str:
    rows = []
    for name, task in facts["scores"].items():
        s = task["scores"]
        top = max(score["value"] for score in s.values())
        cells = "".join(_score(s[k], s[k]["value"] == top > 0) for k in ("base", name, MERGED))
        title = _e(facts["data"][name]["title"])
        rows.append(
            f"<tr><td>{title}<br><small>{_e(task['metric'])}, {task['examples']} held-out "
            f"examples</small></td>{cells}</tr>"
        )
    head = "<th>task</th><th class=n>base</th><th class=n>its adapter</th><th class=n>merged</th>"
    dropped = facts["merge"]["dropped_energy"]
    return (
        f"<h2>Held-out scores</h2><table><tr>{head}</tr>{''.join(rows)}</table>"
        f"{_image(score_plot(facts), 'Bars of held-out scores with 95 % intervals')}"
        "<p class='note'>In brackets: 95 % Wilson intervals. The merge is the exact sum of the "
        f"three changes, cut to rank {facts['merge']['rank']} per site; the cut dropped "
        f"{100 * dropped:.1f} % of its squared norm.</p>"
    )


def _score(score: dict[str, Any], best: bool) -> str:
    kind = "n good" if best else "n"
    low, high = 100 * score["low"], 100 * score["high"]
    return (
        f"<td class='{kind}'>{100 * score['value']:.0f} %<br>"
        f"<small>[{low:.0f}, {high:.0f}]</small></td>"
    )


def _figure(title: str, png: bytes, caption: str) -> str:
    return f"<h2>{_e(title)}</h2>{_image(png, title)}<p class='note'>{_e(caption)}</p>"


def _image(png: bytes, alt: str) -> str:
    data = base64.b64encode(png).decode()
    return f"<img alt='{_e(alt)}' src='data:image/png;base64,{data}'>"


def _answers(facts: dict[str, Any]) -> str:
    rows = []
    for name, task in facts["scores"].items():
        for sample in task["samples"]:
            cells = (_short(sample[k]) for k in ("question", "reference", "base", name, MERGED))
            rows.append("<tr>" + "".join(f"<td><code>{_e(c)}</code></td>" for c in cells) + "</tr>")
    head = "".join(f"<th>{h}</th>" for h in ("asked", "right", "base", "its adapter", "merged"))
    return (
        "<h2>Answers</h2><p class='note'>The first held-out rows of each task, unselected.</p>"
        f"<table class='answers'><tr>{head}</tr>{''.join(rows)}</table>"
    )


def _checks(facts: dict[str, Any]) -> str:
    lines = [f"{name}: {t['parity']}" for name, t in facts["train"].items() if t["parity"]]
    peft = facts["peft"]
    if peft["peft"] is None:
        lines.append(peft["note"])
    else:
        verdict = "ok" if peft["passed"] else "DIFFERS"
        lines.append(
            f"exports read by PEFT {peft['peft']}: largest |difference| of logits, {verdict}"
            f" (largest logit {peft['largest_logit']:.1f})"
        )
        lines += [f"  {n}: {d:.2e}" for n, d in peft["differences"].items()]
    for name, found in facts["inspect"].items():
        lines += [f"{name}: {problem}" for problem in found["problems"]]
    return f"<h2>Checks</h2><pre>{_e(chr(10).join(lines))}</pre>"


def _cost(facts: dict[str, Any]) -> str:
    rows = [
        f"<tr><td>train {_e(n)}</td><td class=n>{t['steps']}</td><td class=n>{t['tokens']:,}</td>"
        f"<td class=n>{t['loss']:.3f}</td><td class=n>{t['seconds']:.0f}</td></tr>"
        for n, t in facts["train"].items()
    ]
    rest = sum(s["seconds"] for s in facts["scores"].values())
    rows.append(f"<tr><td>evaluate</td><td></td><td></td><td></td><td class=n>{rest:.0f}</td></tr>")
    head = "".join(
        f"<th{' class=n' if i else ''}>{h}</th>"
        for i, h in enumerate(("stage", "steps", "tokens", "last loss", "seconds"))
    )
    machine = ", ".join(f"{k} {v}" for k, v in facts["machine"].items())
    table = f"<table><tr>{head}</tr>{''.join(rows)}</table>"
    return f"<h2>Cost</h2>{table}<p class='note'>{_e(machine)}</p>"


def _next(folder: Path) -> str:
    name = "home_en"
    lines = [
        f"plait chat --base smollm2-135m --adapter {folder}/adapters/{name}",
        f"plait inspect {folder}/adapters/{name}",
        f"plait merge {folder}/adapters/home_en {folder}/adapters/home_de -o {folder}/both",
        f"ls {folder}/peft        # folders that PEFT, vLLM and transformers load",
    ]
    return f"<h2>Go on</h2><pre>{_e(chr(10).join(lines))}</pre>"


def _short(text: str, most: int = 180) -> str:
    return text if len(text) <= most else text[:most].rstrip() + " ..."


def _e(text: Any) -> str:
    return html.escape(str(text))
