"""Reports as pictures: maps over layers and modules, spectra, profiles, how alike adapters are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from plait.evaluation.figures import new_figure
from plait.evaluation.inspection.inspecting import Inspection
from plait.evaluation.inspection.report import AdapterReport, SiteReport
from plait.evaluation.inspection.similarity import Pair
from plait.evaluation.inspection.tables import by_module

Value = Callable[[SiteReport], float | None]
LINES = ("#3b6fb6", "#d1772c", "#2c8a6a", "#9a4fb0", "#b3261e", "#6b7a90", "#a08a00", "#00838f")
MOST_PAIRS = 6
"""More pairs than these have no map of their own."""


def adapter_figures(report: AdapterReport) -> dict[str, Any]:
    """{name: figure}: norms, effective_ranks and spectra; ranks where they differ, entanglement and
    intruders where they were asked for."""
    relative = any(s.relative_norm is not None for s in report.sites)
    label = "norm of dW / norm of W" if relative else "norm of dW (Frobenius)"
    norm: Value = (lambda s: s.relative_norm) if relative else (lambda s: s.norm)
    figures = {
        "norms": _site_map(report, label, norm),
        "effective_ranks": _site_map(report, "effective rank", lambda s: s.effective_rank),
        "spectra": _spectra(report),
    }
    if len({s.rank for s in report.sites if s.rank is not None}) > 1:
        figures["ranks"] = _site_map(report, "rank", lambda s: s.rank, whole=True)
    if any(s.entropy for s in report.sites):
        figures["entanglement"] = _entanglement(report)
    if any(s.intruders is not None for s in report.sites):
        counts: Value = lambda s: None if s.intruders is None else s.intruders.count  # noqa: E731
        figures["intruders"] = _site_map(report, "intruder dimensions", counts, whole=True)
    return figures


def pair_figures(inspection: Inspection) -> dict[str, Any]:
    """{name: figure}: matrices of cosines and overlaps, and for few adapters maps of the cosine."""
    if not inspection.pairs:
        return {}
    figures = {"similarity": _matrices(inspection)}
    shown = [pair for pair in inspection.pairs if pair.sites][:MOST_PAIRS]
    if shown and len(inspection.pairs) <= MOST_PAIRS:
        figures["cosines"] = _pair_maps(inspection, shown)
    return figures


def _site_map(report: AdapterReport, label: str, value: Value, whole: bool = False) -> Any:
    """Layers x modules on a scale from 0; `whole` numbers also stand in their cells."""
    sites = {s.path: value(s) for s in report.sites}
    grid, rows, columns = _grid(report.sites, sites)
    figure = new_figure(1.7 + 0.48 * len(columns), 1.3 + 0.13 * len(rows))
    axes = figure.subplots()
    largest = max((v for v in sites.values() if v is not None), default=0)
    image = _show(axes, grid, rows, columns, vmin=0, vmax=largest or 1)
    if whole:
        _write_numbers(axes, grid)
    axes.set_ylabel("layer")
    axes.set_title(f"{report.name} ({report.method})", fontsize=10)
    figure.colorbar(image, ax=axes, label=label)
    return figure


def _grid(
    sites: Sequence[SiteReport], values: Mapping[str, float | None]
) -> tuple[Any, list[int | None], list[str]]:
    """Values as layers x modules, NaN where there is none."""
    import numpy as np

    rows = sorted({s.layer for s in sites}, key=lambda i: -1 if i is None else i)
    columns = list(dict.fromkeys(s.module for s in sites))
    grid = np.full((len(rows), len(columns)), np.nan)
    for site in sites:
        if (v := values.get(site.path)) is not None:
            grid[rows.index(site.layer), columns.index(site.module)] = v
    return grid, rows, columns


def _show(
    axes: Any, grid: Any, rows: Sequence[int | None], columns: Sequence[str], **options: Any
) -> Any:
    axes.set_facecolor("0.85")  # what has no value shows as grey
    options = {"cmap": "viridis", **options}
    image = axes.imshow(grid, aspect="auto", interpolation="nearest", **options)
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor")
    step = max(1, -(-len(rows) // 16))
    shown = range(0, len(rows), step)
    axes.set_yticks(shown, ["none" if rows[i] is None else str(rows[i]) for i in shown])
    axes.tick_params(labelsize=8)
    return image


def _write_numbers(axes: Any, grid: Any, form: str = "{:.0f}", size: float = 7) -> None:
    """Each value in its cell, in whichever of black and white can be read on its colour."""
    import numpy as np

    image = axes.images[0]
    for row, column in np.argwhere(~np.isnan(grid)):
        red, green, blue, _ = image.cmap(image.norm(grid[row, column]))
        colour = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
        text = {"ha": "center", "va": "center", "color": colour, "fontsize": size}
        axes.text(column, row, form.format(grid[row, column]).replace("-0.00", "0.00"), **text)


def _spectra(report: AdapterReport) -> Any:
    import numpy as np

    lines = {}
    for name, sites in by_module(report).items():
        known = [s.singular_values for s in sites if s.singular_values and not s.is_zero]
        if known:
            shortest = min(map(len, known))
            lines[name] = np.median([np.array(k[:shortest]) / k[0] for k in known], axis=0)
    figure, axes = _lines({n: (range(1, len(y) + 1), y) for n, y in lines.items()})
    axes.set_xlabel("component")
    axes.set_ylabel("singular value / largest, median")
    axes.set_yscale("log")
    lowest = min((float(y[y > 0].min()) for y in lines.values() if (y > 0).any()), default=0.1)
    axes.set_ylim(max(1e-6, 0.5 * lowest), 1.5)
    axes.set_title(f"{report.name} ({report.method})", fontsize=10)
    return figure


def _entanglement(report: AdapterReport) -> Any:
    import numpy as np

    from plait.linalg.entanglement import prime_factors

    lines = {}
    for name, sites in by_module(report).items():
        known = [s for s in sites if s.entropy]
        if known and len({len(s.entropy) for s in known}) == 1:
            # From the middle, so that the cuts between rows and columns stand in one line.
            middle = len(prime_factors(known[0].shape[0]))
            cuts = np.arange(1, len(known[0].entropy) + 1) - middle
            lines[name] = (cuts, np.median([s.entropy for s in known], axis=0))
    figure, axes = _lines(lines)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.axvline(0, color="0.6", linewidth=1, linestyle="--", zorder=0)
    axes.set_xlabel("cut: rows before 0, columns after, both apart at 0")
    axes.set_ylabel("entanglement entropy, nats, median")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{report.name} ({report.method})", fontsize=10)
    return figure


def _lines(lines: Mapping[str, tuple[Any, Any]]) -> tuple[Any, Any]:
    figure = new_figure(5.3, 3.6)
    axes = figure.subplots()
    for i, (name, (x, y)) in enumerate(lines.items()):
        axes.plot(x, y, marker=".", label=name, color=LINES[i % len(LINES)], linewidth=1.3)
    axes.spines[["top", "right"]].set_visible(False)
    if lines:
        figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    return figure, axes


def _matrices(inspection: Inspection) -> Any:
    import numpy as np

    labels = [r.name for r in inspection.reports]
    panels = {
        "cosine": "cosine",
        "columns overlap": "column_overlap",
        "rows overlap": "row_overlap",
    }
    side = 1.2 + 0.5 * len(labels)
    figure = new_figure(3 * side + 1.5, side + 0.6)
    for axes, (title, name) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        grid = np.full((len(labels), len(labels)), np.nan)
        np.fill_diagonal(grid, 1.0)
        for pair in inspection.pairs:
            value = getattr(pair, name)
            if value is not None:
                i, j = labels.index(pair.first), labels.index(pair.second)
                grid[i, j] = grid[j, i] = value
        low, colours = (-1, "RdBu_r") if name == "cosine" else (0, "viridis")
        image = axes.imshow(grid, vmin=low, vmax=1, cmap=colours)
        axes.set_facecolor("0.85")
        _write_numbers(axes, grid, "{:.2f}", 8)
        shown = [_short(label) for label in labels]
        axes.set_xticks(range(len(labels)), shown, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(labels)), shown if name == "cosine" else [""] * len(labels))
        axes.tick_params(labelsize=8)
        axes.set_title(title, fontsize=10)
        figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def _pair_maps(inspection: Inspection, pairs: Sequence[Pair]) -> Any:
    """The cosine of each pair at every site, all on one scale."""
    sites = list({s.path: s for r in inspection.reports for s in r.sites}.values())
    values = [{s.path: s.cosine for s in pair.sites} for pair in pairs]
    # Cosines below a tenth are noise between adapters of a few hundred numbers a side.
    most = max(0.1, *(max(map(abs, v.values())) for v in values))
    grids = [_grid(sites, v) for v in values]
    _, rows, columns = grids[0]
    across = min(3, len(pairs))
    down = -(-len(pairs) // across)
    width, height = 0.6 + 0.33 * len(columns), 1.1 + 0.09 * len(rows)
    figure = new_figure(width * across + 1.4, height * down + 0.2)
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(pairs) :]:
        axes.set_axis_off()
    for axes, pair, (grid, _, _) in zip(panels.flat, pairs, grids, strict=False):
        image = _show(axes, grid, rows, columns, cmap="RdBu_r", vmin=-most, vmax=most)
        axes.set_title(f"{_short(pair.first)}, {_short(pair.second)}", fontsize=9)
    for axes in panels[:, 0]:
        axes.set_ylabel("layer")
    figure.colorbar(image, ax=panels.ravel().tolist(), label="cosine of the changes")
    return figure


def _short(label: str, most: int = 18) -> str:
    return label if len(label) <= most else "…" + label[1 - most :]
