"""`plait convert`: an adapter in another format, or of another rank."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plait.cli.common import BASE_HELP, examples, open_base


def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="Folder or file, of any format.")],
    target: Annotated[str, typer.Argument(metavar="OUT", help="Folder (plait, peft) or file.")],
    to: Annotated[str, typer.Option(help="peft, plait, kohya or diffusers.")] = "peft",
    rank: Annotated[
        int | None, typer.Option(help="Cut every site to this rank, as well as can be.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="Cut to the fewest components with this share, as in 0.99.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help=f"{BASE_HELP} For methods that need its weights.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Which adapter, of a bank (plait compress --joint).")
    ] = None,
) -> None:
    """Rewrite an adapter for PEFT and vLLM, kohya, diffusers or Plait; or take one out of a bank.

    Exact unless --rank or --energy is given; those make a plain LoRA and say what they dropped.
    """
    import plait
    from plait.adapter.formats import read_adapter
    from plait.compression import Bank

    if adapter is not None:
        found = Bank.load(source).adapter(adapter)
    elif base is None:
        found = read_adapter(source)
    else:
        found = plait.load(open_base(base)[0], source)
    if rank is not None or energy is not None:
        found = found.to_lora(rank=rank, energy=energy)
        print(dropped_line(found.info["dropped_energy"]))
    written = found.save(target, format=to)
    print(f"wrote {written} ({to}, {size_of(Path(written))})")


def dropped_line(dropped: dict[str, float]) -> str:
    """The worst site and the mean of what a cut dropped."""
    worst = max(dropped, key=dropped.__getitem__, default=None)
    if worst is None or dropped[worst] == 0:
        return "nothing was dropped: the result is exact"
    mean = sum(dropped.values()) / len(dropped)
    return f"dropped energy: mean {mean:.3%}, most {dropped[worst]:.3%} at {worst}"


def files_of(path: Path) -> list[Path]:
    """A file itself, or all files in a folder."""
    return [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]


def size_of(path: Path) -> str:
    """The size of a file or folder, for people."""
    return size_text(sum(p.stat().st_size for p in files_of(path)))


def size_text(count: int) -> str:
    """So many bytes, for people."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def add(app: typer.Typer) -> None:
    app.command(
        short_help="Another format, or a smaller rank.",
        epilog=examples(
            "plait convert out/sql out/sql-peft --to peft",
            "plait convert out/sql sql-small --to plait --energy 0.99",
            "plait convert out/bank out/sql --adapter sql",
            "plait convert style.safetensors out/style --to plait",
        ),
    )(convert)
