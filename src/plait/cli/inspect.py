"""`plait inspect`: what is in an adapter, and whether it is sound."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.common import BASE_HELP, examples, note, on_terminal, open_base, print_table

if TYPE_CHECKING:
    from plait.evaluation.inspection import Inspection


def inspect(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER...", help="Folders or files, of any format."),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            help=f"{BASE_HELP} Adds norms relative to its weights, and says whether it fits."
        ),
    ] = None,
    sites: Annotated[bool, typer.Option("--sites", help="One line a site.")] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write report.html, report.json and plots (PNG) here."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, every number.")] = False,
    intruders: Annotated[
        bool, typer.Option("--intruders", help="Look for intruder dimensions (needs --base).")
    ] = False,
    top: Annotated[int, typer.Option(help="Leading singular vectors that are looked at.")] = 10,
    cosine: Annotated[
        float, typer.Option(help="Below this |cosine| with all of the base's, one is an intruder.")
    ] = 0.5,
    entropy: Annotated[
        bool, typer.Option("--entropy", help="Add entanglement entropies and their valley.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Fail (exit 2) on any problem.")] = False,
    allow: Annotated[
        list[str] | None,
        typer.Option(help="A check that --check lets pass, as in dead-ranks (repeat)."),
    ] = None,
) -> None:
    """Show size, norms, effective ranks and the health of adapters, and how alike several are.

    Columns: norm is Frobenius, relative is that over the base weight's, spectral the largest
    singular value, eff. rank exp(entropy of the spectrum), stable norm^2 / spectral^2, and 99 % how
    many components hold 99 % of the squared norm. Means over layers. Checks: not-finite, zero,
    dead-ranks, outlier, outweighs, wrong-base, scale.
    """
    from plait.errors import PlaitError, unknown
    from plait.evaluation.inspection import (
        CHECKS,
        IntruderSearch,
        inspect_adapters,
        write_inspection,
    )

    for name in allow or []:
        if name not in CHECKS:
            raise unknown("check", name, CHECKS)
    if intruders and base is None:
        raise PlaitError("intruders are found beside the base's weights; name it with --base.")
    found = inspect_adapters(
        paths,
        None if base is None else _weights(base),
        entropy=entropy,
        intruders=IntruderSearch(top, cosine) if intruders else None,
        progress=on_terminal(),
    )
    if as_json:
        print(found.to_json() if len(paths) > 1 else found.reports[0].to_json())
    else:
        _show(found, sites)
    if out is not None:
        for written in write_inspection(found, out):
            note(f"wrote {written}")
    failing = found.failing(allow or ())
    if check and failing:
        raise PlaitError(f"{', '.join(paths)}: {'; '.join(failing)}.")


def _weights(base: str) -> Any:
    """A checkpoint's folder, which is read site by site; a hub's model is loaded."""
    from plait.training.bases import get_base

    found = get_base(base)
    return found if isinstance(found, Path) else open_base(base)[0]


def _show(found: Inspection, every_site: bool) -> None:
    from plait.evaluation.inspection import tables

    several = len(found.reports) > 1
    for report in found.reports if not several or every_site else []:
        print_table(tables.report_table(report, every_site))
    if several:
        print_table(tables.overview_table(found))
        print_table(tables.pair_table(found))
    for report in found.reports:
        name = f"{report.name}: " if several else ""
        for reason in dict.fromkeys(s.note for s in report.sites if s.note):
            count = sum(s.note == reason for s in report.sites)
            print(f"{name}not measured: {count} sites: {reason}")
        for line in (tables.base_line(report), tables.saving_line(report)):
            if line:
                print(f"{name}{line}")
    print("\n".join(f"problem: {p}" for p in found.problems()) or "no problems found")


def add(app: typer.Typer) -> None:
    app.command(
        short_help="What is in an adapter; is it sound?",
        epilog=examples(
            "plait inspect out/sql",
            "plait inspect out/sql --base smollm2-135m --intruders --out out/inspection",
            "plait inspect out/sql out/french out/maths --out out/compared",
            "plait inspect adapter.safetensors --json > report.json",
            "plait inspect out/sql --base smollm2-135m --check --allow dead-ranks",
        ),
    )(inspect)
