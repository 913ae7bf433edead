"""One `plait search`: what its method wants, its folder, and what is said at the end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.cli.common import Shelf, base_of, open_base
from plait.cli.search_data import Tasks, batches_of, digest_of, digest_of_adapters
from plait.errors import PlaitError

BUDGETED = ("evaluations", "steps", "tune", "preference")
"""Options with which a search goes on rather than being another one."""


@dataclass
class Asked:
    """How the model is asked."""

    metric: str
    scorer: Callable[..., Any] | None
    batch_size: int
    max_length: int
    max_new_tokens: int
    template: bool

    def measures(self, tasks: Tasks, tokenizer: Any) -> dict[str, Any]:
        """{task: its `Measure`}."""
        from plait.evaluation.measure import Measure

        return {
            task: Measure(
                tokenizer,
                questions,
                self.metric,
                scorer=self.scorer,
                batch_size=self.batch_size,
                max_new_tokens=self.max_new_tokens,
                max_length=self.max_length,
                template=self.template,
            )
            for task, questions in tasks.items()
        }


def check_method(
    name: str, options: dict[str, Any], budget: int | None, metric: str, scored: bool
) -> Any:
    """The method with its options and budget; PlaitError where these do not fit, or each other."""
    from plait.merging.search import WANTS, get_search_method, make_search
    from plait.merging.search.packages import require

    way = make_search(get_search_method(name), options)
    if budget is not None:
        way = way.within(budget)
    require(*way.packages)
    if metric != "loss" or scored:
        if way.wants in ("inputs", "experts"):
            raise PlaitError(f"{name} wants {WANTS[way.wants]}, and no metric; leave it out.")
        if way.gradient:
            raise PlaitError(
                f"{name} follows gradients, which only the loss has; leave out the metric, or take "
                "a method without gradients (lorahub, octo-planner, m2n2, map)."
            )
    return way


class Run:
    """The search of one folder."""

    def __init__(
        self,
        out: Path,
        adapters: Sequence[str],
        base: str | None,
        dtype: str,
        tasks: Tasks,
        asked: Asked,
        seed: int,
    ) -> None:
        self.out, self.paths, self.tasks, self.asked, self.seed = out, adapters, tasks, asked, seed
        self.base = base if base is not None else base_of(adapters)
        self.dtype = dtype
        self.trials = out / "trials.jsonl"
        self.known = 0
        self.names: list[str] = []

    def prepare(self, way: Any, restart: bool) -> None:
        """What can be found wrong before the model is loaded; and the folder."""
        from plait.adapter.formats import read_adapter

        names = distinct([read_adapter(path).name for path in self.paths])
        if way.wants == "experts" and set(self.tasks) != set(names):
            raise PlaitError(
                f"this method wants the inputs of each adapter, as --data NAME=FILE for "
                f"{', '.join(names)}; there are {', '.join(self.tasks)}."
            )
        if self.out.exists() and not self.out.is_dir():
            raise PlaitError(f"{self.out} is a file; give a folder.")
        self.out.mkdir(parents=True, exist_ok=True)
        if restart:
            self.trials.unlink(missing_ok=True)
        self.names = names

    def search(
        self, method: str, way: Any, options: dict[str, Any], budget: int | None, progress: bool
    ) -> Any:
        """`plait.merging.search.search` with what the method wants."""
        import plait
        from plait.merging.search import Log, search

        model, tokenizer = open_base(self.base, self.dtype)
        shelf = Shelf(model)
        for path, name in zip(self.paths, self.names, strict=True):
            shelf.names[path] = plait.load(model, path, name, activate=False).name
        facts = {
            "method": method,
            "options": {k: v for k, v in dataclasses.asdict(way).items() if k not in BUDGETED},
            "base": self.base,
            "dtype": self.dtype,
            "data": digest_of(self.tasks),
            "adapters' tensors": digest_of_adapters(plait.adapters(model)),
            "asked": {k: v for k, v in dataclasses.asdict(self.asked).items() if k != "scorer"},
        }
        self.known = _lines(self.trials)
        return search(
            model,
            self.names,
            method,
            budget=budget,
            seed=self.seed,
            log=Log(self.trials, progress=progress, facts=facts),
            **self._wanted(way, tokenizer),
            **options,
        )

    def _wanted(self, way: Any, tokenizer: Any) -> dict[str, Any]:
        asked, gradient_free = self.asked, not way.gradient
        if way.wants == "metrics":
            measures = asked.measures(self.tasks, tokenizer)
            return {"metrics": {task: measure.value for task, measure in measures.items()}}
        if way.wants == "scores":
            import torch

            every = list(asked.measures(self.tasks, tokenizer).values())
            return {"scores": lambda model: torch.cat([m.scores(model) for m in every])}
        if way.wants == "loss" and gradient_free:
            import torch

            every = list(asked.measures(self.tasks, tokenizer).values())
            means = [(lambda model, m=m: -m.value(model)) for m in every]
            return {
                "objective": lambda model, step: torch.tensor(
                    sum(mean(model) for mean in means) / len(means)
                )
            }
        return {
            "data": batches_of(
                self.tasks, tokenizer, asked.batch_size, asked.max_length, asked.template
            )
        }

    # -- the end ---------------------------------------------------------------------------------

    def lines(self, method: str, way: Any, found: Any) -> list[str]:
        """What is printed."""
        count = len(found.history)
        new = count - min(count, max(0, self.known))
        told = [f"{method}: {count} evaluations ({new} of them new)"]
        if found.front is not None:
            told += _front_lines(found)
        elif way.wants == "scores":
            n = found.facts["scores"].shape[1]
            told.append(f"mean score {-found.value / n:.4g} on {n} examples")
        else:
            first = found.history[0]["value"]
            what = f"what is lowered ({self.objective(way)})"
            told.append(f"{what}: {first:.4g} at the start, {found.value:.4g} now")
        return told + _weight_lines(found)

    def objective(self, way: Any) -> str:
        """What a search lowered, in words."""
        if way.wants != "loss":
            return {"inputs": "entropy", "experts": "distance from the experts"}[way.wants]
        metric = "score" if self.asked.scorer is not None else self.asked.metric
        return "loss" if metric == "loss" else f"minus {metric}"

    def write(self, method: str, way: Any, found: Any) -> None:
        """coefficients.json and search.json."""
        import plait
        from plait.evaluation.results import finite

        if found.summed:
            found.save(self.out / "coefficients.json")
        facts = {
            "plait": plait.__version__,
            "method": method,
            "options": dataclasses.asdict(way),
            "base": self.base,
            "adapters": dict(zip(self.names, map(str, self.paths), strict=True)),
            "data": {task: len(questions) for task, questions in self.tasks.items()},
            "metric": "scorer" if self.asked.scorer is not None else self.asked.metric,
            "seed": self.seed,
            "evaluations": len(found.history),
            "value": found.value,
            "values": [entry.get("value") for entry in found.history],
            "groups": found.space.groups,
            "coefficients": found.coefficients.tolist(),
            "front": None if found.front is None else found.front.described(),
            **{k: found.facts[k] for k in ("pairs", "merge", "chunks") if k in found.facts},
        }
        text = json.dumps(finite(facts), indent=1, allow_nan=False)
        (self.out / "search.json").write_text(text + "\n", encoding="utf-8")


def distinct(names: Sequence[str]) -> list[str]:
    """The names, numbered from the second of a kind on."""
    found: list[str] = []
    for number, name in enumerate(names):
        found.append(name if name not in found else f"{name}-{number}")
    return found


def _lines(trials: Path) -> int:
    """How many trials a file knows."""
    if not trials.is_file():
        return 0
    return trials.read_text(encoding="utf-8").count('"point"')


def _front_lines(found: Any, most: int = 6) -> list[str]:
    front = found.front
    told = [f"front of {len(front.points)} points, by surrogates that explain of held-out points:"]
    for name, surrogate in zip(front.objectives, front.surrogates, strict=True):
        told[-1] += f" {name} {surrogate.held_out_r2:.3f}"
    order = front.metrics[:, 0].argsort().tolist()
    step = max(1, (len(order) - 1) // (most - 1)) if len(order) > 1 else 1
    names = front.objectives
    for row in order[::step][: most - 1] + order[-1:]:
        values = front.metrics[row].tolist()
        told.append("  " + "  ".join(f"{n} {v:.4g}" for n, v in zip(names, values, strict=True)))
    chosen = zip(front.objectives, found.facts["metrics"], strict=True)
    told.append("chosen: " + "  ".join(f"{name} {value:.4g}" for name, value in chosen))
    return told


def _weight_lines(found: Any) -> list[str]:
    told = []
    names = found.space.names
    for name, row in zip(names, found.coefficients[: len(names)].tolist(), strict=True):
        if len(row) == 1:
            told.append(f"{name} {row[0]:.4g}")
        else:
            mean = sum(row) / len(row)
            told.append(
                f"{name} {mean:.4g} on average of {len(row)}, {min(row):.4g} to {max(row):.4g}"
            )
    return told
