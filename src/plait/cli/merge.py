"""`plait merge`: several adapters into one, models into a checkpoint, or what a recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from plait.cli.common import BASE_HELP, examples, read_settings
from plait.errors import PlaitError

RECIPES = (".yaml", ".yml")


def merge(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Adapters of any format; models; or one recipe (.yaml, also mergekit's).",
        ),
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="Where to write the result.")],
    method: Annotated[
        str | None, typer.Option(help="See `plait methods --merge`; else linear.")
    ] = None,
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
    statistics: Annotated[
        list[str] | None,
        typer.Option(
            help="For methods that need some: a file of plait.merging.statistics for each input, "
            "in their order (repeat)."
        ),
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
    model: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER: where a recipe's model lies, if not there (repeat)."),
    ] = None,
    processes: Annotated[int, typer.Option(help="Of models: writers at the same time.")] = 1,
    shard_size: Annotated[float, typer.Option(help="Of models: gigabytes a file.")] = 5.0,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Write merge.json and merge.png (a heat map) here: norms, cosines, conflicts of "
            "sign and energy dropped, site by site."
        ),
    ] = None,
) -> None:
    """Merge adapters of one base into a plain LoRA, models into a checkpoint, or run a recipe.

    A recipe is mergekit's YAML as it is (models, slices, gradients, filters, tokenizers), or one
    with Plait's methods; of adapters it gives an adapter. A merge of models that was interrupted
    goes on when the same command is run again.
    """
    from plait.cli import merge_run

    is_recipe = any(path.endswith(RECIPES) for path in inputs)
    options = _options(setting or [])
    if density is not None:
        options["density"] = density
    asked = merge_run.Asked(
        inputs=inputs,
        out=out,
        method=method or "linear",
        weights=read_weights(weights) if weights is not None else None,
        options=options,
        statistics=statistics or None,
        space=space,
        rank=rank,
        energy=energy,
        to=to,
        name=name or name_from(out),
        base=base,
        into=into,
        seed=seed,
        processes=processes,
        shard_size=shard_size,
        report=report,
    )
    if is_recipe:
        said = (method, weights, density, space, statistics, rank, energy, setting, base, into)
        _check_recipe(inputs, said)
        merge_run.merge_recipe(asked, _pairs(model or []))
    elif model:
        raise PlaitError("--model says where a recipe's models lie; name a recipe (.yaml).")
    elif into is not None or (base is None and merge_run.holds_models(inputs)):
        merge_run.merge_models(asked)
    else:
        merge_run.merge_adapters(asked, weights)


def _check_recipe(inputs: list[str], said: tuple[Any, ...]) -> None:
    """A recipe says everything but where, how fast and from which seed."""
    if len(inputs) > 1:
        raise PlaitError(f"a recipe is merged alone, not with {len(inputs) - 1} other inputs.")
    if any(value is not None and value != [] for value in said):
        raise PlaitError(
            f"{inputs[0]} says what is merged and how; leave out the options but --seed, --model, "
            "--to, --processes, --shard-size and --report."
        )


def _pairs(words: list[str]) -> dict[str, str]:
    found = {}
    for word in words:
        key, equals, folder = word.partition("=")
        if not equals or not key or not folder:
            raise PlaitError(f"--model {word!r}: write NAME=FOLDER.")
        found[key] = folder
    return found


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
        short_help="Several adapters or models into one, or a recipe.",
        epilog=examples(
            "plait merge out/sql out/french -o out/both",
            "plait merge a b c --weights 1,0.5,-0.2 --rank 16 -o out/abc",
            "plait merge a b --energy 0.99 --to peft -o out/ab-peft",
            "plait merge a b c --method ties --density 0.3 -o out/ties",
            "plait merge out/sql out/french --weights out/both/coefficients.json -o out/again",
            "plait merge model-a model-b a --method ties --into base-model -o out/model",
            "plait merge recipe.yaml -o out/model --report out/report",
        ),
    )(merge)
