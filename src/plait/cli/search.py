"""`plait search`: the coefficients of adapters that do best on data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from plait.cli.common import BASE_HELP, can_draw, examples, note, on_terminal, read_settings
from plait.cli.convert import dropped_line, size_of


def search(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="Of one base.")],
    method: Annotated[
        str, typer.Option("--method", "-m", help="See `plait methods --merge`: those with data.")
    ],
    data: Annotated[
        list[str],
        typer.Option(
            help="TASK=FILE, one for each objective (repeat); FILE is .jsonl, or a recipe (.yaml) "
            "for its eval_data. Without TASK= the file's name is the task."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder; the search goes on from it.")],
    base: Annotated[str | None, typer.Option(help=f"{BASE_HELP} Else the adapters' own.")] = None,
    budget: Annotated[
        int | None, typer.Option(help="Evaluations of the model; else the method's default.")
    ] = None,
    metric: Annotated[
        str, typer.Option(help="loss, exact_match or choice (gradients need the loss).")
    ] = "loss",
    scorer: Annotated[
        str | None, typer.Option(help="module:function, as in `plait eval`, in place of a metric.")
    ] = None,
    prefer: Annotated[
        str | None, typer.Option(help="Of a front: a weight for each task, as in 1,0.5.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many rows a task.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows at once.")] = 8,
    max_length: Annotated[int, typer.Option(help="Tokens after which a row is cut.")] = 1024,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 64,
    template: Annotated[
        bool, typer.Option("--template/--no-template", help="Use the chat template.")
    ] = True,
    dtype: Annotated[str, typer.Option(help="Of the base: auto, float32, bfloat16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of methods that draw.")] = 0,
    rank: Annotated[int | None, typer.Option(help="Cut the result's sites to this rank.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Cut to the fewest components with this share, as in 0.99.")
    ] = None,
    to: Annotated[str, typer.Option(help="plait, peft, kohya or diffusers.")] = "plait",
    setting: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="An option of the method (repeat).")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget the trials that the folder holds.")
    ] = False,
) -> None:
    """Search the adapters' coefficients; the same command again goes on where it was interrupted.

    Writes adapter (the merge), coefficients.json (for `plait merge --weights`), search.json,
    trials.jsonl, and for several objectives front.png.
    """
    from plait.cli.evaluate import _import_scorer
    from plait.cli.search_data import read_tasks
    from plait.cli.search_run import Asked, Run, check_method

    options = read_settings(setting or [])
    if prefer is not None:
        options["preference"] = _numbers(prefer)
    judge = _import_scorer(scorer) if scorer is not None else None
    way = check_method(method, options, budget, metric, judge is not None)
    tasks = read_tasks(data, limit)
    asked = Asked(metric, judge, batch_size, max_length, max_new_tokens, template)
    run = Run(out, adapters, base, dtype, tasks, asked, seed)
    run.prepare(way, restart)
    try:
        found = run.search(method, way, options, budget, on_terminal())
    except KeyboardInterrupt:
        note(f"the trials are in {run.trials}; the same command goes on from there")
        raise
    for line in run.lines(method, way, found):
        print(line)
    merged = found.merged(name=_name(out), rank=rank, energy=energy)
    if rank is not None or energy is not None:
        print(dropped_line(merged.info["dropped_energy"]))
    written = merged.save(out / "adapter", format=to)
    run.write(method, way, found)
    if found.front is not None:
        _plot(found, out / "front.png")
    also = "coefficients.json and search.json" if found.summed else "search.json"
    print(f"wrote {written} ({to}, {size_of(Path(written))}), {also}")


def _numbers(text: str) -> list[float]:
    from plait.cli.merge import parse_weights

    return parse_weights(text)


def _name(out: Path) -> str:
    from plait.cli.merge import name_from

    return name_from(str(out))


def _plot(found: Any, file: Path) -> None:
    """The front as an image, where matplotlib is installed."""
    if not can_draw("front.png"):
        return
    from plait.merging.search.plot import front_plot

    note(f"wrote {front_plot(found, file)}")


def add(app: typer.Typer) -> None:
    app.command(
        short_help="Coefficients for a merge, searched with data.",
        epilog=examples(
            "plait search out/sql out/french -m lorahub --data few.jsonl -o out/both",
            "plait search a b c -m adamerging --data a=a.jsonl --data b=b.jsonl --budget 100 -o o",
            "plait search a b -m map --data sql=s.jsonl --data chat=c.jsonl --prefer 1,0.5 -o o",
            "plait search a b -m m2n2 --data quiz.jsonl --metric choice --budget 300 -o o",
            "plait merge out/sql out/french --weights out/both/coefficients.json -o out/again",
        ),
    )(search)
