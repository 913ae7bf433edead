"""Showing an adapter's report: a table for the terminal, heat maps and spectra as PNG."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from plait.errors import PlaitError
from plait.evaluation.inspect import AdapterReport, SiteReport


def report_table(report: AdapterReport, every_site: bool = False) -> Any:
    """A rich table: one row for each kind of module (means over layers), or one for each site."""
    from rich.table import Table

    table = Table(title=_title(report), title_justify="left")
    table.add_column("site" if every_site else "module")
    for name in ("sites", "rank", "norm", "relative", "spectral", "eff. rank", "stable", "99 %"):
        if not (every_site and name == "sites"):
            table.add_column(name, justify="right")
    groups = {s.path: [s] for s in report.sites} if every_site else by_module(report)
    for name, sites in groups.items():
        counted = [] if every_site else [str(len(sites))]
        table.add_row(name, *counted, *_cells(sites))
    return table


def by_module(report: AdapterReport) -> dict[str, list[SiteReport]]:
    """The sites by the last part of their path, in order of appearance."""
    groups: dict[str, list[SiteReport]] = {}
    for site in report.sites:
        groups.setdefault(site.module, []).append(site)
    return groups


def _title(report: AdapterReport) -> str:
    size = f"{report.bytes / 1e6:.2f} MB" if report.bytes >= 1e4 else f"{report.bytes} bytes"
    return (
        f"{report.name} ({report.method}): {len(report.sites)} sites, "
        f"{report.parameters:,} trainable parameters, {size}, norm {report.norm:.4g}"
    )


def _cells(sites: Sequence[SiteReport]) -> list[str]:
    ranks = [s.rank for s in sites if s.rank is not None]
    rank = "" if not ranks else str(ranks[0]) if len(set(ranks)) == 1 else _span(ranks)
    needed = [s.ranks[0.99] for s in sites if s.ranks]
    return [
        rank,
        _mean([s.norm for s in sites], "{:.4g}"),
        _mean([s.relative_norm for s in sites], "{:.2%}"),
        _mean([s.spectral_norm for s in sites], "{:.4g}"),
        _mean([s.effective_rank for s in sites], "{:.1f}"),
        _mean([s.stable_rank for s in sites], "{:.1f}"),
        _mean(list(needed), "{:.1f}"),
    ]


def _span(ranks: Sequence[int]) -> str:
    return f"{min(ranks)}-{max(ranks)}"


def _mean(values: Sequence[float | None], form: str) -> str:
    known = [v for v in values if v is not None]
    return form.format(sum(known) / len(known)) if known else "-"


def plot_report(report: AdapterReport, directory: str | os.PathLike[str]) -> list[Path]:
    """Write norms.png, effective_ranks.png (layers x modules) and spectra.png into a folder, also
    ranks.png where the sites' ranks differ, and entanglement.png where it has entropies."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PlaitError("plots need matplotlib; run `pip install 'plait[plots]'`.") from None
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    relative = any(s.relative_norm is not None for s in report.sites)
    label = "norm of dW / norm of W" if relative else "norm of dW (Frobenius)"
    figures = {
        "norms": _heat_map(
            Figure, report, label, lambda s: s.relative_norm if relative else s.norm
        ),
        "effective_ranks": _heat_map(Figure, report, "effective rank", lambda s: s.effective_rank),
        "spectra": _spectra(Figure, report),
    }
    if len({s.rank for s in report.sites if s.rank is not None}) > 1:
        figures["ranks"] = _heat_map(Figure, report, "rank", lambda s: s.rank, whole=True)
    if any(s.entropy for s in report.sites):
        figures["entanglement"] = _entanglement(Figure, report)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=150, bbox_inches="tight")
    return paths


def _heat_map(
    figure_class: Any,
    report: AdapterReport,
    label: str,
    value: Callable[[SiteReport], Any],
    whole: bool = False,
) -> Any:
    """Layers x modules; `whole` numbers also stand in their cells, on a scale from 0."""
    import numpy as np

    rows = sorted({s.layer for s in report.sites}, key=lambda i: -1 if i is None else i)
    columns = list(by_module(report))
    grid = np.full((len(rows), len(columns)), np.nan)
    for site in report.sites:
        if (v := value(site)) is not None:
            grid[rows.index(site.layer), columns.index(site.module)] = v
    figure = figure_class(figsize=(1.6 + 0.75 * len(columns), 1.6 + 0.22 * len(rows)))
    axes = figure.subplots()
    axes.set_facecolor("0.85")  # what has no value shows as grey
    low = 0 if whole else None
    image = axes.imshow(grid, aspect="auto", cmap="viridis", interpolation="nearest", vmin=low)
    if whole:
        _write_numbers(axes, grid)
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
    step = max(1, len(rows) // 16)
    shown = range(0, len(rows), step)
    axes.set_yticks(shown, ["none" if rows[i] is None else str(rows[i]) for i in shown])
    axes.set_ylabel("layer")
    axes.set_title(f"{report.name} ({report.method})")
    figure.colorbar(image, ax=axes, label=label)
    return figure


def _write_numbers(axes: Any, grid: Any) -> None:
    import numpy as np

    most = np.nanmax(grid)
    for row, column in np.argwhere(~np.isnan(grid)):
        colour = "black" if grid[row, column] > 0.6 * most else "white"
        text = {"ha": "center", "va": "center", "color": colour, "fontsize": 7}
        axes.text(column, row, f"{grid[row, column]:.0f}", **text)


def _entanglement(figure_class: Any, report: AdapterReport) -> Any:
    import numpy as np

    figure = figure_class(figsize=(6.4, 4.2))
    axes = figure.subplots()
    for name, sites in by_module(report).items():
        profiles = [s.entropy for s in sites if s.entropy]
        if profiles and len({len(p) for p in profiles}) == 1:
            cuts = np.linspace(0, 1, len(profiles[0]) + 2)[1:-1]
            axes.plot(cuts, np.median(np.array(profiles), axis=0), marker=".", label=name)
    axes.set_xlabel("cut through the chain of rows, then columns")
    axes.set_ylabel("entanglement entropy, nats (median over layers)")
    axes.set_title(f"{report.name} ({report.method})")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small")
    return figure


def _spectra(figure_class: Any, report: AdapterReport) -> Any:
    import numpy as np

    figure = figure_class(figsize=(6.4, 4.2))
    axes = figure.subplots()
    for name, sites in by_module(report).items():
        lines = [s.singular_values for s in sites if s.singular_values and not s.is_zero]
        if not lines:
            continue
        shortest = min(map(len, lines))
        scaled = np.array([np.array(line[:shortest]) / line[0] for line in lines])
        axes.plot(range(1, shortest + 1), np.median(scaled, axis=0), marker=".", label=name)
    axes.set_xlabel("component")
    axes.set_ylabel("singular value / largest (median over layers)")
    axes.set_yscale("log")
    axes.set_ylim(bottom=1e-6)
    axes.set_title(f"{report.name} ({report.method})")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small")
    return figure
