"""`plait merge`: several adapters into one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from plait.cli.common import BASE_HELP, Shelf, examples, on_terminal, open_base, read_settings
from plait.cli.convert import dropped_line, size_of


def merge(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="Folders or files, of any format.")
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="Where to write the result.")],
    method: Annotated[str, typer.Option(help="See `plait methods --merge`.")] = "linear",
    weights: Annotated[
        str | None, typer.Option(help="One for each, joined by commas: 1,0.5,-0.2. Else the mean.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Cut every site to this rank.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Cut to the fewest components with this share, as in 0.99.")
    ] = None,
    to: Annotated[str, typer.Option(help="plait, peft, kohya or diffusers.")] = "plait",
    name: Annotated[str | None, typer.Option(help="The result's name; else from --out.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="An option of the method (repeat).")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help=f"{BASE_HELP} For adapters that need its weights.")
    ] = None,
) -> None:
    """Merge adapters of one base into a plain LoRA, exactly unless --rank or --energy cuts it."""
    import plait

    sources: list[Any] = list(adapters)
    if base is not None:
        model = open_base(base)[0]
        names = [Shelf(model).name(path) for path in adapters]
        sources = [plait.adapters(model)[n] for n in names]
    merged = plait.merge(
        sources,
        method,
        parse_weights(weights) if weights is not None else None,
        rank=rank,
        energy=energy,
        name=name or _name_from(out),
        progress=on_terminal(),
        **read_settings(setting or []),
    )
    ranks = sorted({getattr(d, "rank", 0) for d in merged.deltas.values()})
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
    used = merged.info["merge"]["weights"]
    print(f"merged {len(sources)} adapters ({method}, weights {', '.join(f'{w:g}' for w in used)})")
    print(f"{len(merged.deltas)} sites, rank {span}, {merged.num_parameters():,} parameters")
    print(dropped_line(merged.info["dropped_energy"]))
    written = merged.save(out, format=to)
    print(f"wrote {written} ({to}, {size_of(Path(written))})")


def parse_weights(text: str) -> list[float]:
    """`1,0.5,-0.2` as numbers."""
    from plait.errors import PlaitError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise PlaitError(f"weights {text!r}: write numbers joined by commas, as 1,0.5.") from None


def _name_from(out: str) -> str:
    import re

    return re.sub(r"[^A-Za-z0-9_\-]", "-", Path(out).stem).strip("-") or "merged"


def add(app: typer.Typer) -> None:
    app.command(
        short_help="Several adapters into one.",
        epilog=examples(
            "plait merge out/sql out/french -o out/both",
            "plait merge a b c --weights 1,0.5,-0.2 --rank 16 -o out/abc",
            "plait merge a b --energy 0.99 --to peft -o out/ab-peft",
        ),
    )(merge)
