"""`plait compress`: an adapter in fewer numbers or bits, or many behind shared bases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from plait.cli.common import BASE_HELP, examples, open_base
from plait.cli.convert import dropped_line, files_of, size_of, size_text


def compress(
    adapter: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="Folder or file; several for --joint.")
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="Where to write the result.")],
    rank: Annotated[
        int | None, typer.Option(help="At most this rank (size of shared bases) at every site.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="The fewest components with this share, as in 0.95.")
    ] = None,
    budget: Annotated[
        int | None, typer.Option(help="Numbers in all, spent where they hold most.")
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="Store factors in 1 to 8 bits a number (plait's format).")
    ] = None,
    joint: Annotated[
        bool, typer.Option("--joint", help="A bank: adapters of one base behind shared bases.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="Of a bank's bases: float16, bfloat16 or float32.")
    ] = "float16",
    to: Annotated[str, typer.Option(help="plait, peft, kohya or diffusers.")] = "plait",
    base: Annotated[
        str | None, typer.Option(help=f"{BASE_HELP} For methods that need its weights.")
    ] = None,
) -> None:
    """Compress an adapter: lower ranks by the best approximation of its change, or fewer bits.

    --joint puts several adapters of one base into a bank: two bases a site that all share, and a
    small core of each. `plait convert BANK OUT --adapter NAME` takes one out again.
    """
    import plait
    from plait.errors import PlaitError

    if joint:
        _bank(adapter, out, rank, energy, budget, bits, dtype, base)
        return
    if len(adapter) != 1:
        raise PlaitError(f"{len(adapter)} adapters go into one bank with --joint; else name one.")
    (given,) = adapter
    if bits is not None and to != "plait":
        raise PlaitError(f"only Plait's format holds factors in {bits} bits; leave out --to {to}.")
    source: Any = given if base is None else plait.load(open_base(base)[0], given)
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
    print(f"wrote {written} ({to}, {size_of(Path(written))}; was {size_of(Path(given))})")


def _bank(
    paths: list[str],
    out: str,
    rank: int | None,
    energy: float | None,
    budget: int | None,
    bits: int | None,
    dtype: str,
    base: str | None,
) -> None:
    """Several adapters behind shared bases, and what each lost."""
    import plait
    from plait.cli.extract import read_dtype
    from plait.compression import joint_bank

    given: list[Any] = list(paths)
    if base is not None:
        model, _ = open_base(base)
        given = [plait.load(model, path, activate=False) for path in paths]
    bank = joint_bank(
        given, rank=rank, energy=energy, budget=budget, bits=bits, dtype=read_dtype(dtype)
    )
    written = bank.save(out)
    for name, errors in bank.errors.items():
        if errors:
            worst = max(errors, key=errors.__getitem__)
            mean = sum(errors.values()) / len(errors)
            print(f"{name}: error of dW: mean {mean:.2g}, most {errors[worst]:.2g} at {worst}")
    were = sum(f.stat().st_size for p in paths for f in files_of(Path(p)))
    print(
        f"wrote {written} ({len(bank.names)} adapters, {bank.num_parameters():,} numbers, "
        f"{size_of(Path(written))}; were {size_text(were)})"
    )


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
            "plait compress out/sql out/chat out/french --joint --energy 0.95 -o out/bank",
        ),
    )(compress)
