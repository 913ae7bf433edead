"""`plait compare`: which method is best on this data within this budget?"""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from plait.cli.common import examples, finish, note, on_terminal, print_table, quiet
from plait.cli.evaluate import _import_scorer
from plait.cli.train import split_words


def compare(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE.yaml|MODULE:OBJECT [key=value]...",
            help="A recipe, or a task of your own (also as `task:` in the recipe); keys of it with "
            "other values.",
        ),
    ],
    methods: Annotated[
        str,
        typer.Option(
            "--methods", "-m", help="lora,dora,pissa+lora-plus,lora:rank=4,none (all weights)."
        ),
    ],
    budget: Annotated[
        str | None, typer.Option(help="Wall time for all of it: 30m, 2h. Else no limit.")
    ] = None,
    parameters: Annotated[
        str,
        typer.Option(help="Trained parameters: auto (the recipe's method), a number, or default."),
    ] = "auto",
    lr: Annotated[str, typer.Option(help="Learning rates to search, LOW:HIGH.")] = "1e-4:1e-1",
    steps: Annotated[int | None, typer.Option(help="Of a trial; else as many as fit.")] = None,
    trials: Annotated[int | None, typer.Option(help="Learning rates a method.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Seeds a finalist.")] = None,
    finalists: Annotated[int | None, typer.Option(help="How many methods; else all.")] = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="An even grid to the end, without Optuna or pruning.")
    ] = False,
    equal: Annotated[str, typer.Option(help="What trials share: steps or time.")] = "steps",
    metric: Annotated[str, typer.Option(help="Of a recipe: loss, exact_match or choice.")] = "loss",
    scorer: Annotated[
        str | None, typer.Option(help="module:function(prediction, row), as in `plait eval`.")
    ] = None,
    test_rows: Annotated[int, typer.Option(help="At most so many rows to report on.")] = 200,
    validation_rows: Annotated[int, typer.Option(help="At most so many to tune on.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 64,
    processes: Annotated[int, typer.Option(help="Trials at once.")] = 1,
    ray: Annotated[bool, typer.Option("--ray", help="Run trials on a Ray cluster.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder; else the recipe's output-compare.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start anew, removing what the folder holds.")
    ] = False,
) -> None:
    """Hold a bake-off: same data, steps, parameters and seeds, learning rates tuned for all.

    Writes report.html and comparison.json. No winner is named while differences lie within noise.
    Interrupted, the same command goes on with what is left of the budget.
    """
    from plait.study.comparing import compare as run

    asked = {"metric": metric, "test_rows": test_rows, "validation_rows": validation_rows}
    asked |= {"max_new_tokens": max_new_tokens}
    asked |= {"scorer": None if scorer is None else _import_scorer(scorer)}
    task = read_task(words, asked)
    try:
        with quiet(), _shown() as progress:
            found = run(
                task,
                methods,
                budget=budget,
                output=out,
                parameters=_count(parameters),
                lr=_range(lr),
                steps=steps,
                trials=trials,
                seeds=seeds,
                finalists=finalists,
                grid=grid,
                equal=equal,  # type: ignore[arg-type]
                processes=processes,
                ray=ray,
                restart=restart,
                progress=progress,
            )
    except KeyboardInterrupt:
        again = shlex.join(["plait", *(w for w in sys.argv[1:] if w != "--restart")])
        note(f"\ninterrupted: finished trials are kept. Go on with\n  {again}")
        finish(130)
        return
    print_table(found.table())
    for row in found.rows:
        if row.problem:
            note(f"{row.label}: {row.problem}")
    print(found.advice)
    note(f"wrote {found.report}")


def read_task(words: list[str], asked: dict[str, Any]) -> Any:
    """The task that the words name; `asked` are `RecipeTask`'s options."""
    from plait.errors import PlaitError
    from plait.study.recipe_task import RecipeTask
    from plait.study.task import open_task

    files, overrides = split_words(words)
    if not files:
        raise PlaitError("compare: name a recipe or a task, as in recipe.yaml or tasks.py:digits.")
    if ":" in files[0] and not Path(files[0]).is_file():
        return changed(open_task(files[0]), {}, overrides)
    values = _yaml(files[0])
    if "task" in values:
        spec = str(values.pop("task"))
        return changed(open_task(spec), values, overrides)
    from plait.training.recipe import Recipe

    return RecipeTask(Recipe.load(files[0], overrides), **asked)


def changed(task: Any, values: dict[str, Any], overrides: list[str]) -> Any:
    """The task with keys of its recipe replaced."""
    import dataclasses

    from plait.training.recipe import Recipe

    if values or overrides:
        known = {k: v for k, v in dataclasses.asdict(task.recipe).items() if k not in values}
        task.recipe = Recipe.make({**known, **values}, overrides, where="task")
    return task


def _yaml(path: str) -> dict[str, Any]:
    """The keys of a YAML file; what is wrong with it, `Recipe.load` says."""
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _count(text: str) -> int | str | None:
    from plait.errors import PlaitError

    if text in ("auto", "default"):
        return text if text == "auto" else None
    try:
        return int(float(text.replace(",", "").replace("_", "")))
    except ValueError:
        raise PlaitError(f"--parameters {text!r}: auto, default, or a number.") from None


def _range(text: str) -> tuple[float, float]:
    from plait.errors import PlaitError

    try:
        low, high = (float(x) for x in text.split(":"))
    except ValueError:
        raise PlaitError(f"--lr {text!r}: write LOW:HIGH, as in 1e-4:1e-1.") from None
    return low, high


@contextlib.contextmanager
def _shown() -> Iterator[Any]:
    """A bar with what is running and the time left; without a terminal a line for each trial."""
    if not on_terminal():
        yield lambda event: note(f"[{_left(event.left)}] {event.text}")
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("bake-off"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*columns, TextColumn("{task.fields[facts]}"), console=console) as bar:
        task = bar.add_task("", total=None, facts="")

        def show(event: Any) -> None:
            facts = f"{event.text}  {_left(event.left)}"
            bar.update(task, completed=event.done, total=event.total or None, facts=facts)

        yield show


def _left(seconds: float) -> str:
    if seconds == float("inf"):
        return "no limit"
    whole = max(0, int(seconds))
    return f"{whole // 60}:{whole % 60:02d} left"


def add(app: typer.Typer) -> None:
    app.command(
        short_help="Which method is best on your data? A fair bake-off.",
        epilog=examples(
            "plait compare recipe.yaml --methods lora,dora,pissa,lora-sb --budget 30m",
            "plait compare recipe.yaml -m lora,lora+lora-plus --metric exact_match --budget 1h",
            "plait compare tasks.py:digits -m lora,hra,none --grid --trials 6 --seeds 5",
        ),
    )(compare)
