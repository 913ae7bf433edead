"""One setting of the benchmark: the base, its experts, the tasks' rows, and what merging may ask of
them. `Bench.row(contender)` is a contender's line of results.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.merging import statistics
from benchmarks.merging.contenders import Contender, needs_of
from benchmarks.merging.experts import JOINT, RUNS, Recipe, expert
from benchmarks.merging.measure import Batches, changes, norm, normalised, score_all
from benchmarks.merging.scorer import Scorer, Words, batches
from benchmarks.merging.tasks import Task
from benchmarks.merging.tune import BUDGET, Tuned, tune
from torch import Tensor

import plait
from plait.adapter import Adapter
from plait.linalg import LowRank
from plait.merging import get_merge_method

Change = Mapping[str, LowRank]
Line = dict[str, Any]


@dataclass
class Bench:
    """`sizes`: rows of train, validation and test of a held-in task, and test rows of others."""

    scorer: Scorer
    tokenizer: Any
    tasks: Sequence[Task]
    recipe: Recipe = field(default_factory=Recipe)
    runs: Path = RUNS
    sizes: tuple[int, int, int, int] = (2000, 16, 96, 64)
    budget: int = BUDGET

    def __post_init__(self) -> None:
        train, validation, test, others = self.sizes
        words = Words(self.scorer, self.tokenizer)
        self.rows: dict[str, list[dict[str, Tensor]]] = {}
        self.test: dict[str, Batches] = {}
        self.validation_rows: dict[str, list[dict[str, Tensor]]] = {}
        self.kinds = {task.name: task.kind for task in self.tasks}
        for task in self.tasks:
            held_in = task.kind == "held-in"
            parts = task.parts(train, validation, test if held_in else others)
            self.test[task.name] = batches(words.encode(task, parts["test"]))
            if held_in:
                self.rows[task.name] = words.encode(task, parts["train"])
                self.validation_rows[task.name] = words.encode(task, parts["validation"])
        self.validation = {name: batches(rows) for name, rows in self.validation_rows.items()}

    @property
    def held_in(self) -> list[str]:
        """The experts' names, which are their tasks'."""
        return list(self.rows)

    @cached_property
    def experts(self) -> list[Adapter]:
        """One adapter a held-in task."""
        return [self.one(name, [name]) for name in self.held_in]

    def one(self, name: str, tasks: Sequence[str]) -> Adapter:
        """The adapter trained on these tasks."""
        here = {task: self.rows[task] for task in tasks}
        return expert(self.scorer, name, here, self.recipe, self.runs)[0]

    @cached_property
    def base_scores(self) -> dict[str, Any]:
        return score_all(self.scorer, self.test, {})

    @cached_property
    def expert_scores(self) -> dict[str, Any]:
        """{task: the score of its own expert on the test}."""
        return self._own(self.test)

    @cached_property
    def expert_validation(self) -> dict[str, float]:
        """{task: accuracy of its own expert on the validation rows}."""
        return {name: found["accuracy"] for name, found in self._own(self.validation).items()}

    def _own(self, tasks: Mapping[str, Batches]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for adapter in self.experts:
            here = {adapter.name: tasks[adapter.name]}
            found |= score_all(self.scorer, here, changes(adapter))
        return found

    def asked(self, change: Change, factor: float) -> float:
        """What tuning raises: normalised accuracy on validation rows, ties broken by the loss."""
        found = score_all(self.scorer, self.validation, change, factor)
        accuracy = fmean(normalised(found, self.expert_validation, self.held_in))
        return accuracy - 1e-3 * fmean(score["loss"] for score in found.values())

    # -- contenders -------------------------------------------------------------------------------

    def merged(self, contender: Contender, **options: Any) -> Adapter:
        """The merge of all experts; two-input methods merge pairs, then pairs of those, ..."""
        needs = needs_of(contender.method)
        known = statistics.of(self, needs) if needs else None
        if get_merge_method(contender.method).inputs != 2:
            return plait.merge(
                self.experts, contender.method, statistics=known, base=self.scorer, **options
            )
        level = [(adapter, 1) for adapter in self.experts]
        while len(level) > 1:
            pairs = [level[i : i + 2] for i in range(0, len(level), 2)]
            level = [self._pair(contender.method, pair, options) for pair in pairs]
        return level[0][0]

    def _pair(
        self, method: str, pair: list[tuple[Adapter, int]], options: Mapping[str, Any]
    ) -> tuple[Adapter, int]:
        if len(pair) == 1:
            return pair[0]
        total = sum(count for _, count in pair)
        weights = [count / total for _, count in pair]
        return plait.merge([a for a, _ in pair], method, weights, **options), total

    def row(self, contender: Contender) -> Line:
        """Tuned on validation rows, asked on test rows."""
        if contender.own is not None:
            return self._known(contender)
        statistics.of(self, needs_of(contender.method))
        spent = {"merge": 0.0, "merges": 0}
        made: dict[str, tuple[Change, int]] = {}

        def change(knob: Any) -> Change:
            key = repr(knob)
            if key not in made:
                start = time.process_time()
                adapter = self.merged(contender, **contender.at(knob))
                spent["merge"] += time.process_time() - start
                spent["merges"] += 1
                made[key] = changes(adapter), max(low.rank for low in changes(adapter).values())
            return made[key][0]

        start = time.process_time()
        if contender.tuned:
            best = tune(
                lambda knob, factor: self.asked(change(knob), factor),
                contender.knobs,
                lambda knob: norm(change(knob)),
                self.budget,
            )
        else:
            best = Tuned(contender.knobs[0])
        tuning = time.process_time() - start - spent["merge"]
        tasks = score_all(self.scorer, self.test, change(best.knob), best.factor)
        return {
            "label": contender.label,
            "method": contender.method,
            "knob": contender.knob[0] if contender.knob else None,
            "value": best.knob,
            "factor": best.factor,
            "asked": best.asked,
            "evaluations": len(best.asked),
            "merge_s": round(spent["merge"] / spent["merges"], 3),
            "tuning_s": round(tuning + spent["merge"], 1),
            "rank": made[repr(best.knob)][1],
            "needs": sorted(needs_of(contender.method)),
            "tasks": tasks,
        }

    def _known(self, contender: Contender) -> Line:
        """Every held-in task with the merge made for it; other tasks have none."""
        assert contender.own is not None
        tasks, seconds, rank = {}, 0.0, 0
        for i, name in enumerate(self.held_in):
            start = time.process_time()
            options = {**contender.options, **contender.own(i, len(self.held_in))}
            change = changes(self.merged(contender, **options))
            seconds += time.process_time() - start
            rank = max(rank, *(low.rank for low in change.values()))
            tasks |= score_all(self.scorer, {name: self.test[name]}, change)
        return {
            "label": contender.label,
            "method": contender.method,
            "evaluations": 0,
            "merge_s": round(seconds / len(self.held_in), 3),
            "tuning_s": 0.0,
            "rank": rank,
            "needs": ["task"],
            "tasks": tasks,
        }

    def references(self) -> list[Line]:
        """The base, each task's own expert, and one adapter trained on all tasks together."""
        name = f"{JOINT}-{len(self.held_in)}"
        joint = score_all(self.scorer, self.test, changes(self.one(name, self.held_in)))
        found = {
            "base": self.base_scores,
            "own experts": self.expert_scores,
            "trained together": joint,
        }
        return [
            {"label": label, "method": None, "evaluations": 0, "tasks": tasks}
            for label, tasks in found.items()
        ]
