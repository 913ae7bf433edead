"""`plait show`: which places of a base model a pattern touches."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from plait.cli.common import examples, print_table, read_settings


def show(
    base: Annotated[str, typer.Argument(help="A base: short name, local folder or hub id.")],
    targets: Annotated[
        str | None,
        typer.Option(
            help="all-linear, all-conv, embeddings, experts, blocks, ffn; names joined by commas; "
            "or a regular expression for whole paths. The method's own when left out."
        ),
    ] = None,
    exclude: Annotated[str | None, typer.Option(help="What to leave out; same forms.")] = None,
    layers: Annotated[str | None, typer.Option(help="Only these blocks: 0,4,20-29.")] = None,
    method: Annotated[str, typer.Option(help="What would act there, and is counted.")] = "lora",
    setting: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="An option of it: rank=16 (repeat).")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="One line a site, not grouped.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which sites of a base a pattern touches, and what a method would train there.

    No weights are loaded: the structure comes from the model's config.
    """
    from plait.adapter import find_sites, get_method, make_options
    from plait.cli.skeleton import skeleton

    chosen = get_method(method)
    options = make_options(chosen, read_settings(setting or []))
    sites = find_sites(
        skeleton(base),
        parse_targets(targets) if targets is not None else chosen.targets,
        exclude=parse_targets(exclude) if exclude is not None else None,
        layers=parse_layers(layers) if layers is not None else None,
        kinds=chosen.kinds or None,
    )
    count = chosen.count(sites, options) if chosen.count is not None else None
    if as_json:
        facts = {
            "base": base,
            "method": chosen.name,
            "trainable": count,
            "sites": [{"path": s.path, "kind": s.kind, "shape": list(s.shape)} for s in sites],
        }
        print(json.dumps(facts, indent=2))
        return
    print_table(_table(sites, every))
    weights = sum(_size(s.shape) for s in sites)
    summary = f"{len(sites)} sites, {weights:,} base weights"
    if count is not None:
        summary += f"; {chosen.name} would train {count:,} parameters"
        summary += f" ({count / weights:.2%})" if weights else ""
    print(summary)


def parse_targets(text: str) -> str | list[str]:
    """A comma makes a list of names; anything else is a keyword, a name or a regular expression."""
    if re.fullmatch(r"[\w.\-]+(\s*,\s*[\w.\-]+)+", text):
        return [part.strip() for part in text.split(",")]
    return text


def parse_layers(text: str) -> list[int]:
    """`0,4,20-29` as numbers."""
    from plait.errors import PlaitError

    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None:
            raise PlaitError(f"layers {text!r}: {part!r} is no number or range; write 0,4,20-29.")
        first = int(match[1])
        found += range(first, int(match[2] or first) + 1)
    return found


def group_paths(paths: Sequence[str]) -> dict[str, list[str]]:
    """Paths that differ in numbers alone, under one pattern: `model.layers.{0-29}.mlp.up_proj`."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path), []).append(path)
    return {_fill_ranges(pattern, found): found for pattern, found in groups.items()}


def _fill_ranges(pattern: str, paths: list[str]) -> str:
    parts = [path.split(".") for path in paths]
    filled = []
    for place, word in enumerate(pattern.split(".")):
        if word == "*":
            numbers = sorted({int(p[place]) for p in parts})
            word = str(numbers[0]) if len(numbers) == 1 else f"{{{_ranges(numbers)}}}"
        filled.append(word)
    return ".".join(filled)


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _table(sites: Sequence[Any], every: bool) -> Any:
    from rich.table import Table

    by_path = {s.path: s for s in sites}
    groups = {p: [p] for p in by_path} if every else group_paths(list(by_path))
    table = Table(box=None, pad_edge=False)
    table.add_column("sites")
    table.add_column("kind")
    for name in ("shape", "count", "weights"):
        table.add_column(name, justify="right")
    for pattern, paths in groups.items():
        members = [by_path[p] for p in paths]
        shapes = list(dict.fromkeys(" x ".join(map(str, s.shape)) for s in members))
        shape = shapes[0] if len(shapes) == 1 else f"{len(shapes)} shapes"
        weights = sum(_size(s.shape) for s in members)
        # The braces of a pattern are text, not markup.
        table.add_row(pattern, members[0].kind, shape, str(len(paths)), f"{weights:,}")
    return table


def _size(shape: Sequence[int]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def add(app: typer.Typer) -> None:
    app.command(
        short_help="Which sites of a base a pattern touches.",
        epilog=examples(
            "plait show smollm2-135m",
            "plait show smollm2-135m --targets q_proj,v_proj --layers 20-29 -s rank=16",
            "plait show ./my-model --targets '.*mlp.*' --method lora-xs --all",
        ),
    )(show)
