"""`plait prune`: a smaller dense model, and its adapters cut along."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from plait.cli.common import BASE_HELP, examples, note, on_terminal, open_base_for, quiet
from plait.cli.convert import size_of

Many = list[str] | None


def prune(
    out: Annotated[str, typer.Option("--out", "-o", help="Folder to write, new.")],
    base: Annotated[
        str | None, typer.Argument(metavar="[BASE]", help=f"{BASE_HELP} Else the adapter's own.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="A .jsonl file of rows, of which a few are looked at.")
    ] = None,
    ratio: Annotated[float, typer.Option(help="Share of the heads and channels that go.")] = 0.2,
    importance: Annotated[
        str, typer.Option(help="taylor, lora (of an adapter's gradients), magnitude or random.")
    ] = "taylor",
    order: Annotated[str, typer.Option(help="Of taylor: first, second or mixed.")] = "mixed",
    mode: Annotated[
        str, typer.Option(help="block (heads, channels) or channel (the width of the stream).")
    ] = "block",
    scope: Annotated[
        str, typer.Option(help="local (the same share everywhere) or global; global needs --any.")
    ] = "local",
    steps: Annotated[int, typer.Option(help="Times that importance is measured.")] = 1,
    multiple: Annotated[int, typer.Option(help="Keep widths multiples of this.")] = 1,
    skip: Annotated[
        list[int] | None, typer.Option(help="Blocks that stay whole (repeat); needs --any.")
    ] = None,
    loadable: Annotated[
        bool,
        typer.Option("--loadable/--any", help="Only sizes that from_pretrained can load."),
    ] = True,
    adapter: Annotated[
        Many, typer.Option(help="Cut this along (repeat); the first is active meanwhile.")
    ] = None,
    fuse: Annotated[bool, typer.Option(help="Write the adapter into the weights.")] = False,
    samples: Annotated[int, typer.Option(help="Rows of the data to look at.")] = 16,
    max_length: Annotated[int, typer.Option(help="Tokens of a row.")] = 128,
    dtype: Annotated[str, typer.Option(help="Of the base: auto, float32, bfloat16.")] = "auto",
) -> None:
    """Take the least important heads and channels out of a model: smaller, dense, checked.

    An adapter trained under the rule lora-prune knows which units go: give it with --adapter and
    leave --data out.
    """
    import plait
    from plait.compression import prune as run
    from plait.compression.pruning import Taylor
    from plait.errors import PlaitError

    if Path(out).exists():
        raise PlaitError(f"{out} exists already; give another folder.")
    given = adapter or []
    rows = _rows(data)[:samples] if data is not None else []
    model, tokenizer = open_base_for(given, base, dtype)
    loaded = [plait.load(model, path, activate=False) for path in given]
    if loaded:
        plait.activate(model, loaded[0].name)
    keep = loaded[0].info.get("lora-prune", {}).get("kept") if loaded and not rows else None
    if on_terminal():
        note("following the model, measuring what matters")
    result = run(
        model,
        ratio=ratio,
        data=_batches(rows, tokenizer, max_length),
        importance=Taylor(order=order) if importance == "taylor" else importance,  # type: ignore[arg-type]
        mode=mode,  # type: ignore[arg-type]
        scope=scope,  # type: ignore[arg-type]
        steps=steps,
        multiple=multiple,
        skip=skip or (),
        keep=keep,
        loadable=loadable,
    )
    if fuse and loaded:
        plait.fuse(model)
    with quiet():
        written = result.save(out, tokenizer)
    for line in _report(result):
        print(line)
    for name, cut in {} if fuse else result.adapters.items():
        cut.info["base"] = str(written)
        print(f"wrote {cut.save(written / 'adapters' / name)}")
    print(f"wrote {written} ({size_of(written)})")


def _rows(source: str) -> list[Any]:
    from plait.training.data import read_examples

    return list(read_examples(source))


def _batches(rows: list[Any], tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """One row a batch: second derivatives are means of squares over them."""
    from plait.training.data import Collator, encode_all

    if not rows:
        return []
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    collator = Collator(filler, max_length=max_length)
    items = encode_all(rows, tokenizer, max_length).items
    return [collator([item]) for item in items]


def _report(result: Any) -> list[str]:
    gone = 1 - result.after / result.before
    lines = [f"{result.before:,} parameters before, {result.after:,} after: {gone:.1%} less"]
    if result.config:
        sizes = ", ".join(f"{key} {value}" for key, value in result.config.items())
        lines.append(f"config: {sizes} (from_pretrained loads it)")
    elif result.config is None:
        lines.append("no configuration says these sizes: plait.compression.load_pruned loads it")
    if result.left_whole:
        name, why = next(iter(result.left_whole.items()))
        lines.append(f"{len(result.left_whole)} groups such as {name} left whole: {why} (--any)")
    return lines


def add(app: typer.Typer) -> None:
    app.command(
        short_help="A model without its least important heads and channels.",
        epilog=examples(
            "plait prune smollm2-135m --data train.jsonl --ratio 0.2 -o out/smaller",
            "plait prune smollm2-135m --data train.jsonl --adapter out/sql -o out/smaller",
            "plait prune --adapter out/pruned-in-training --fuse -o out/smaller",
            "plait prune base --importance magnitude --scope global --any -o out/uneven",
        ),
    )(prune)
