"""`plait inspect`: what is in an adapter, and whether it is sound."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plait.cli.common import BASE_HELP, examples, note, on_terminal, open_base, print_table


def inspect(
    path: Annotated[str, typer.Argument(help="An adapter: folder or file, of any format.")],
    base: Annotated[
        str | None, typer.Option(help=f"{BASE_HELP} Adds norms relative to its weights.")
    ] = None,
    sites: Annotated[bool, typer.Option("--sites", help="One line a site.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, every number.")] = False,
    plots: Annotated[
        Path | None,
        typer.Option(help="Write maps (norms, ranks) and spectra (PNG) to this folder."),
    ] = None,
    entropy: Annotated[
        bool, typer.Option("--entropy", help="Add entanglement entropies (JSON and plots).")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Fail (exit 2) on any problem.")] = False,
) -> None:
    """Show size, norms, effective ranks and the health of an adapter.

    Columns: norm is Frobenius, relative is that over the base weight's, spectral the largest
    singular value, eff. rank exp(entropy of the spectrum), stable norm^2 / spectral^2, and 99 % how
    many components hold 99 % of the squared norm. Means over layers.
    """
    from plait.adapter.formats import read_adapter
    from plait.errors import PlaitError
    from plait.evaluation.inspect import inspect_adapter
    from plait.evaluation.inspect_show import plot_report, report_table

    model = None if base is None else open_base(base)[0]
    adapter = read_adapter(path, model=model)
    report = inspect_adapter(adapter, model, entropy=entropy, progress=on_terminal())
    if as_json:
        print(report.to_json())
    else:
        print_table(report_table(report, every_site=sites))
        for reason in dict.fromkeys(s.note for s in report.sites if s.note):
            print(f"not measured: {sum(s.note == reason for s in report.sites)} sites: {reason}")
    problems = report.problems()
    if not as_json:
        print("\n".join(f"problem: {p}" for p in problems) or "no problems found")
    if plots is not None:
        for written in plot_report(report, plots):
            note(f"wrote {written}")
    if check and problems:
        raise PlaitError(f"{path}: {'; '.join(problems)}.")


def add(app: typer.Typer) -> None:
    app.command(
        short_help="What is in an adapter; is it sound?",
        epilog=examples(
            "plait inspect out/sql",
            "plait inspect out/sql --base smollm2-135m --plots out/plots",
            "plait inspect adapter.safetensors --json > report.json",
        ),
    )(inspect)
