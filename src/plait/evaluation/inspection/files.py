"""An inspection as a folder: report.html (everything, in one file), report.json and the plots."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from plait.adapter.formats.atomic import text_writer, write_file
from plait.evaluation.inspection import tables
from plait.evaluation.inspection.inspecting import Inspection
from plait.evaluation.inspection.plots import adapter_figures, pair_figures
from plait.evaluation.inspection.report import AdapterReport
from plait.evaluation.page import (
    Cell,
    Code,
    Folded,
    Part,
    Picture,
    Section,
    Side,
    Table,
    Text,
    Tone,
    png,
    write_page,
)

CAPTIONS = {
    "norms": "How much each site changes.",
    "effective_ranks": "In how many directions: exp(entropy of the singular values' shares).",
    "spectra": "How the change is spread over its components: medians over layers.",
    "ranks": "The rank that each site has.",
    "entanglement": "A drop at 0 is the valley that a low rank leaves: at most ln r there.",
    "intruders": "Leading singular vectors of W + dW that W does not have.",
    "similarity": (
        "Cosine of the changes; overlap of the spaces they write to (columns) and read from (rows)."
    ),
    "cosines": "Where two adapters pull the same way (red) and against each other (blue).",
}
DPI = 130


def write_inspection(inspection: Inspection, folder: str | os.PathLike[str]) -> list[Path]:
    """Write report.html, report.json and every plot as PNG; returns their paths.

    With several adapters a plot's name begins with its adapter's. Raises PlaitError without
    matplotlib.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, dict[str, bytes]] = {"": _drawn(pair_figures(inspection))}
    pictures |= {r.name: _drawn(adapter_figures(r)) for r in inspection.reports}
    written = []
    slugs = _slugs(list(pictures))
    for label, drawn in pictures.items():
        prefix = f"{slugs[label]}-" if label and len(inspection.reports) > 1 else ""
        for name, data in drawn.items():
            written.append(target / f"{prefix}{name}.png")
            written[-1].write_bytes(data)
    numbers = target / "report.json"
    write_file(numbers, text_writer(inspection.to_json() + "\n"))
    html = write_page(target / "report.html", _title(inspection), _parts(inspection, pictures))
    return [html, numbers, *written]


def _drawn(figures: dict[str, Any]) -> dict[str, bytes]:
    return {name: png(figure, DPI) for name, figure in figures.items()}


def _slugs(labels: list[str]) -> dict[str, str]:
    """Names from other people's files, as names of files."""
    found: dict[str, str] = {}
    for label in labels:
        slug = re.sub(r"[^\w\-]+", "-", label).strip("-")[:60] or "adapter"
        found[label] = slug if slug not in found.values() else f"{slug}-{len(found)}"
    return found


def _title(inspection: Inspection) -> str:
    return ", ".join(r.name for r in inspection.reports)


def _parts(inspection: Inspection, pictures: dict[str, dict[str, bytes]]) -> list[Part]:
    several = len(inspection.reports) > 1
    parts: list[Part] = [_health(inspection)]
    if several:
        parts.append(_overview(inspection))
        parts.append(_similarity(inspection, pictures[""]))
    parts += [_adapter(r, inspection, pictures[r.name]) for r in inspection.reports]
    parts.append(_method(inspection))
    return parts


def _health(inspection: Inspection) -> Section:
    rows = [
        [report.name, Cell(finding.check, "bad"), finding.message]
        for report in inspection.reports
        for finding in report.findings
    ]
    if not rows:
        return Section("Health", [Text("No problems found.", "good")])
    return Section("Health", [Table(["adapter", "check", "found"], rows)])


def _overview(inspection: Inspection) -> Section:
    columns = [
        *("adapter", "method", "sites", "rank", "parameters", "size", "norm", "eff. rank"),
        "problems",
    ]
    rows = []
    for report in inspection.reports:
        *cells, problems = tables.overview_row(report)
        rows.append([*cells[:2], *_typed(["", *cells[2:]])[1:], Cell(problems, _tone(report))])
    return Section("Adapters", [Table(columns, rows)])


def _tone(report: AdapterReport) -> Tone:
    return "bad" if report.findings else "good"


def _similarity(inspection: Inspection, pictures: dict[str, bytes]) -> Section:
    rows = [
        [f"{p.first}, {p.second}", len(p.sites), p.cosine, p.column_overlap, p.row_overlap]
        for p in inspection.pairs
    ]
    columns = ["adapters", "shared sites", "cosine", "columns overlap", "rows overlap"]
    shown: list[Part] = [_picture(name, data) for name, data in pictures.items()]
    return Section("Similarity", [*shown, Folded("Numbers", [Table(columns, rows)])])


def _adapter(report: AdapterReport, whole: Inspection, pictures: dict[str, bytes]) -> Section:
    parts: list[Part] = [Text(tables.headline(report))]
    parts += [Text(line) for line in (tables.base_line(report), _trained(report)) if line]
    for reason in dict.fromkeys(s.note for s in report.sites if s.note):
        count = sum(s.note == reason for s in report.sites)
        parts.append(Text(f"Not measured: {count} sites: {reason}.", "warn"))
    columns, rows = tables.site_rows(report, every_site=False)
    parts.append(Table(columns, [_typed(row) for row in rows]))
    if report.savings is not None:
        line, _, command = tables.saving_line(report).rpartition(": ")
        parts += [Text(f"{line}:"), Code(command)]
    parts.append(Side([_picture(name, data) for name, data in pictures.items()]))
    columns, rows = tables.site_rows(report, every_site=True)
    parts.append(Folded("Every site", [Table(columns, [_typed(row) for row in rows])]))
    return Section(report.name if len(whole.reports) > 1 else "Sites", parts)


def _trained(report: AdapterReport) -> str:
    facts = report.info.get("training")
    if not isinstance(facts, dict):
        return ""
    shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items())
    return f"Trained: {', '.join(shown)}."


def _typed(row: list[str]) -> list[Any]:
    """Numbers stand on the right, whatever they are written with."""
    return [row[0], *(Cell(cell, number=True) for cell in row[1:])]


def _picture(name: str, data: bytes) -> Picture:
    width = int.from_bytes(data[16:20], "big")  # of the PNG's header, in pixels
    return Picture(data, name.replace("_", " "), CAPTIONS.get(name, ""), round(width * 96 / DPI))


def _method(inspection: Inspection) -> Section:
    lines = [
        "norm: Frobenius; relative: over the norm of W; spectral: the largest singular value; "
        "eff. rank: exp(entropy of the singular values' shares); stable: norm² / spectral²; 99 %: "
        "components that hold 99 % of the squared norm. Means over layers.",
    ]
    if inspection.search is not None:
        lines.append(
            f"Intruder dimensions: of the {inspection.search.top} leading left singular vectors of "
            f"W + dW those whose |cosine| with every one of W's is below "
            f"{inspection.search.threshold:g} (Shuttleworth et al., arXiv 2410.21228)."
        )
    return Section("How to read this", [Text(line, "note") for line in lines])
