"""`plait merge`: several adapters into one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from plait.cli.common import BASE_HELP, Shelf, examples, on_terminal, open_base, read_settings
from plait.cli.convert import dropped_line, size_of
from plait.errors import PlaitError


def merge(
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help="Adapters of any format; with --into models too."),
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="Where to write the result.")],
    method: Annotated[str, typer.Option(help="See `plait methods --merge`.")] = "linear",
    weights: Annotated[
        str | None,
        typer.Option(
            help="One for each, joined by commas: 1,0.5,-0.2; or coefficients.json of "
            "`plait search`. Else the mean."
        ),
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of entries kept, for methods that drop some.")
    ] = None,
    space: Annotated[
        str | None, typer.Option(help="factors, aligned or delta; else the method's best.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of methods that draw.")] = 0,
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
    into: Annotated[
        str | None,
        typer.Option(help="A base model's folder: write it with the merge in, tensor by tensor."),
    ] = None,
    processes: Annotated[int, typer.Option(help="With --into: writers at the same time.")] = 1,
) -> None:
    """Merge adapters of one base into a plain LoRA, or adapters and models into a checkpoint."""
    options = _options(setting or [])
    if density is not None:
        options["density"] = density
    found = read_weights(weights) if weights is not None else None
    parts = found if isinstance(found, list) else None
    if into is not None and isinstance(found, dict):
        raise PlaitError(f"{weights} holds weights by site, for adapters; leave out --into.")
    if into is not None:
        _into(adapters, out, method, parts, into, seed, processes, options)
        return
    import plait

    sources: list[Any] = list(adapters)
    if base is not None:
        model = open_base(base)[0]
        names = [Shelf(model).name(path) for path in adapters]
        sources = [plait.adapters(model)[n] for n in names]
    by_site: list[Any] | None = None
    if isinstance(found, dict):
        sources, by_site = _stored(sources, found, str(weights))
    merged = plait.merge(
        sources,
        method,
        parts if by_site is None else by_site,
        space=space,
        rank=rank,
        energy=energy,
        seed=seed,
        name=name or name_from(out),
        progress=on_terminal(),
        **options,
    )
    ranks = sorted({getattr(d, "rank", 0) for d in merged.deltas.values()})
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
    facts = merged.info["merge"]
    used = ", ".join("by site" if isinstance(w, dict) else f"{w:g}" for w in facts["weights"])
    print(f"merged {len(sources)} adapters ({method} in {facts['space']}, weights {used})")
    print(f"{len(merged.deltas)} sites, rank {span}, {merged.num_parameters():,} parameters")
    print(dropped_line(merged.info["dropped_energy"]))
    written = merged.save(out, format=to)
    print(f"wrote {written} ({to}, {size_of(Path(written))})")


def _into(
    inputs: list[str],
    out: str,
    method: str,
    weights: list[float] | None,
    base: str,
    seed: int,
    processes: int,
    options: dict[str, Any],
) -> None:
    """Merge into a checkpoint; a base may be given by its short name."""
    import plait
    from plait.training.bases import get_base

    written = plait.merge_checkpoints(
        inputs,
        out,
        method,
        weights,
        base=get_base(base),
        seed=seed,
        processes=processes,
        progress=on_terminal(),
        **options,
    )
    print(f"merged {len(inputs)} inputs into {base} ({method})")
    print(f"wrote {written} ({size_of(Path(written))}); facts on every tensor in merge.json")


def _options(words: list[str]) -> dict[str, Any]:
    """The method's options; a keyword of the merge itself has an option of the command."""
    from plait.merging import merge
    from plait.merging.records import keywords

    options = read_settings(words)
    for name in options:
        if name in keywords(merge):
            raise PlaitError(
                f"{name} is the merge's own, no option of a method (see `plait merge --help`)."
            )
    return options


def read_weights(text: str) -> list[float] | dict[str, Any]:
    """Numbers, or the coefficients in a file."""
    if not text.endswith(".json"):
        return parse_weights(text)
    from plait.merging.search import read_coefficients

    return read_coefficients(text)


def _stored(sources: list[Any], found: dict[str, Any], file: str) -> tuple[list[Any], list[Any]]:
    """The adapters in the file's order of names, and their weights by site."""
    from plait.cli.search_run import distinct
    from plait.merging.search.stored import fold
    from plait.merging.sources import read_sources

    adapters = read_sources(sources)
    names = distinct([adapter.name for adapter in adapters])
    if set(names) != set(found):
        raise PlaitError(
            f"{file} has weights for {', '.join(found)}; the adapters are {', '.join(names)}."
        )
    return fold(adapters, [found[name] for name in names])


def parse_weights(text: str) -> list[float]:
    """`1,0.5,-0.2` as numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise PlaitError(f"weights {text!r}: write numbers joined by commas, as 1,0.5.") from None


def name_from(out: str) -> str:
    import re

    return re.sub(r"[^A-Za-z0-9_\-]", "-", Path(out).stem).strip("-") or "merged"


def add(app: typer.Typer) -> None:
    app.command(
        short_help="Several adapters into one.",
        epilog=examples(
            "plait merge out/sql out/french -o out/both",
            "plait merge a b c --weights 1,0.5,-0.2 --rank 16 -o out/abc",
            "plait merge a b --energy 0.99 --to peft -o out/ab-peft",
            "plait merge a b c --method ties --density 0.3 -o out/ties",
            "plait merge out/sql out/french --weights out/both/coefficients.json -o out/again",
            "plait merge model-a model-b a --method ties --into base-model -o out/model",
        ),
    )(merge)
