"""`plait compress`: an adapter in fewer numbers, or in fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
    bits: Annotated[
        int | None, typer.Option(help="Store factors in 1 to 8 bits a number (plait's format).")
    ] = None,
    to: Annotated[str, typer.Option(help="plait, peft, kohya or diffusers.")] = "plait",
    base: Annotated[
        str | None, typer.Option(help=f"{BASE_HELP} For methods that need its weights.")
    ] = None,
) -> None:
    """Compress an adapter: lower ranks by the best approximation of its change, or fewer bits."""
    import plait
    from plait.errors import PlaitError

    if bits is not None and to != "plait":
        raise PlaitError(f"only Plait's format holds factors in {bits} bits; leave out --to {to}.")
    source: Any = adapter if base is None else plait.load(open_base(base)[0], adapter)
    small = source
    if bits is None or (rank, energy, budget) != (None, None, None):
        small = plait.squeeze(source, rank, energy=energy, budget=budget)
        _say_ranks(small)
    if bits is None:
        written = small.save(out, format=to)
    else:
        packed = plait.pack(small, out, bits)
        written = packed.path
        _say_errors(packed.errors, bits)
    print(f"wrote {written} ({to}, {size_of(Path(written))}; was {size_of(Path(adapter))})")


def _say_ranks(small: Any) -> None:
    ranks = sorted({getattr(d, "rank", 0) for d in small.deltas.values()})
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
    print(f"{len(small.deltas)} sites, rank {span}, {small.num_parameters():,} parameters")
    print(dropped_line(small.info["dropped_energy"]))


def _say_errors(errors: dict[str, float], bits: int) -> None:
    if errors:
        worst = max(errors, key=errors.__getitem__)
        mean = sum(errors.values()) / len(errors)
        print(
            f"{bits} bits a number, relative error of dW: mean {mean:.2g}, most "
            f"{errors[worst]:.2g} at {worst}"
        )


def add(app: typer.Typer) -> None:
    app.command(
        short_help="Fewer numbers, or fewer bits.",
        epilog=examples(
            "plait compress out/sql --rank 4 -o out/sql-small",
            "plait compress out/sql --energy 0.95 --to peft -o out/sql-peft",
            "plait compress out/sql --budget 500000 -o out/sql-half",
            "plait compress out/sql --rank 8 --bits 4 -o out/sql-tiny",
        ),
    )(compress)
