"""Reports as tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from plait.evaluation.inspection.inspecting import Inspection
from plait.evaluation.inspection.report import AdapterReport, SiteReport

COLUMNS = ("sites", "rank", "norm", "relative", "spectral", "eff. rank", "stable", "99 %")


def report_table(report: AdapterReport, every_site: bool = False) -> Any:
    """A rich table: one row for each kind of module (means over layers), or one for each site."""
    from rich.table import Table

    table = Table(title=headline(report), title_justify="left")
    table.add_column("site" if every_site else "module")
    columns, rows = site_rows(report, every_site)
    for name in columns[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def overview_table(inspection: Inspection) -> Any:
    """One row an adapter."""
    from rich.table import Table

    table = Table()
    table.add_column("adapter")
    table.add_column("method")
    for name in ("sites", "rank", "parameters", "size", "norm", "eff. rank", "problems"):
        table.add_column(name, justify="right")
    for report in inspection.reports:
        table.add_row(*overview_row(report))
    return table


def overview_row(report: AdapterReport) -> list[str]:
    """Name, method, sites, rank, parameters, size, norm, mean effective rank, problems."""
    ranks = [s.rank for s in report.sites if s.rank is not None]
    return [
        report.name,
        report.method,
        str(len(report.sites)),
        span(ranks),
        f"{report.parameters:,}",
        size(report.file_bytes or report.bytes),
        f"{report.norm:.4g}",
        mean([s.effective_rank for s in report.sites], "{:.1f}"),
        str(len(report.findings)) if report.findings else "none",
    ]


def pair_table(inspection: Inspection) -> Any:
    """One row for every two adapters."""
    from rich.table import Table

    table = Table()
    table.add_column("adapters")
    for name in ("shared sites", "cosine", "columns overlap", "rows overlap"):
        table.add_column(name, justify="right")
    for pair in inspection.pairs:
        numbers = (pair.cosine, pair.column_overlap, pair.row_overlap)
        cells = ["-" if v is None else f"{v:.3f}" for v in numbers]
        table.add_row(f"{pair.first}, {pair.second}", str(len(pair.sites)), *cells)
    return table


def by_module(report: AdapterReport) -> dict[str, list[SiteReport]]:
    """The sites by the last part of their path, in order of appearance."""
    groups: dict[str, list[SiteReport]] = {}
    for site in report.sites:
        groups.setdefault(site.module, []).append(site)
    return groups


def site_rows(report: AdapterReport, every_site: bool) -> tuple[list[str], list[list[str]]]:
    """Columns and rows; what nothing is known of (intruders, valleys) has no column."""
    columns = [c for c in COLUMNS if not (every_site and c == "sites")]
    more: dict[str, Callable[[SiteReport], float | None]] = {}
    if any(s.intruders is not None for s in report.sites):
        more["intruders"] = lambda s: None if s.intruders is None else s.intruders.count
    if any(s.entropy for s in report.sites):
        more["valley"] = lambda s: s.valley
    groups = {s.path: [s] for s in report.sites} if every_site else by_module(report)
    rows = []
    for name, sites in groups.items():
        counted = [] if every_site else [str(len(sites))]
        extra = [mean([value(s) for s in sites], "{:.2g}") for value in more.values()]
        rows.append([name, *counted, *_cells(sites), *extra])
    return ["site" if every_site else "module", *columns, *more], rows


def headline(report: AdapterReport) -> str:
    """Name, method, sites, parameters, size and norm, in one line."""
    return (
        f"{report.name} ({report.method}): {len(report.sites)} sites, "
        f"{report.parameters:,} trainable parameters, {size(report.file_bytes or report.bytes)}, "
        f"norm {report.norm:.4g}"
    )


def saving_line(report: AdapterReport) -> str:
    """What a cut at 99 % energy would save; empty where it saves nothing."""
    found = report.savings
    if found is None:
        return ""
    share = 1 - found.bytes / report.bytes
    return (
        f"{found.energy:.0%} of every change fits into {size(found.bytes)} ({share:.0%} less, "
        f"ranks {span(list(found.ranks.values()))}): {found.command}"
    )


def base_line(report: AdapterReport) -> str:
    """Whether the base is the right one, as far as can be told."""
    if report.base is None:
        return ""
    if report.fits_base is None:
        return f"base {report.base}: sites and shapes fit; the adapter names no fingerprint"
    verdict = "the one it was made for" if report.fits_base else "NOT the one it was made for"
    return f"base {report.base}: {verdict}"


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e6:.2f} MB" if count >= 1e4 else f"{count} bytes"


def span(numbers: Sequence[int]) -> str:
    """`8`, `4-16`, or nothing."""
    if not numbers:
        return ""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"


def mean(values: Sequence[float | None], form: str) -> str:
    """The mean of what is known, a dash for nothing."""
    known = [v for v in values if v is not None]
    return form.format(sum(known) / len(known)) if known else "-"


def _cells(sites: Sequence[SiteReport]) -> list[str]:
    return [
        span([s.rank for s in sites if s.rank is not None]),
        mean([s.norm for s in sites], "{:.4g}"),
        mean([s.relative_norm for s in sites], "{:.2%}"),
        mean([s.spectral_norm for s in sites], "{:.4g}"),
        mean([s.effective_rank for s in sites], "{:.1f}"),
        mean([s.stable_rank for s in sites], "{:.1f}"),
        mean([s.ranks.get(0.99) for s in sites], "{:.1f}"),
    ]
