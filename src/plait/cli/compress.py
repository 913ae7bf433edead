"""`plait compress`: an adapter in fewer numbers, or in fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plait.cli.common import BASE_HELP, examples, open_base
from plait.cli.convert import dropped_line, size_of


def compress(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder or file.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Where to write the result.")],
    rank: Annotated[int | None, typer.Option(help="At most this rank at every site.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="The fewest components with this share, as in 0.95.")
    ] = None,
    budget: Annotated[
        int | None, typer.Option(help="Numbers in all, spent where they hold most.")
    ] = None,
    to: Annotated[str, typer.Option(help="plait, peft, kohya or diffusers.")] = "plait",
    base: Annotated[
        str | None, typer.Option(help=f"{BASE_HELP} For methods that need its weights.")
    ] = None,
) -> None:
    """Compress an adapter: lower ranks, by the best approximation of its change."""
    import plait

    source = adapter if base is None else plait.load(open_base(base)[0], adapter)
    before = _size(adapter)
    small = plait.squeeze(source, rank, energy=energy, budget=budget)
    ranks = sorted({getattr(d, "rank", 0) for d in small.deltas.values()})
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
    print(f"{len(small.deltas)} sites, rank {span}, {small.num_parameters():,} parameters")
    print(dropped_line(small.info["dropped_energy"]))
    written = small.save(out, format=to)
    print(f"wrote {written} ({to}, {size_of(Path(written))}; was {before})")


def _size(path: str) -> str:
    return size_of(Path(path))


def add(app: typer.Typer) -> None:
    app.command(
        short_help="Fewer numbers, or fewer bits.",
        epilog=examples(
            "plait compress out/sql --rank 4 -o out/sql-small",
            "plait compress out/sql --energy 0.95 --to peft -o out/sql-peft",
            "plait compress out/sql --budget 500000 -o out/sql-half",
        ),
    )(compress)
