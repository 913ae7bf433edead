"""The course of a bake-off: probes, plan, rounds of tuning, finals."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import plait
from plait.errors import PlaitError
from plait.study.advice import advise
from plait.study.bench import Bench
from plait.study.comparing import Event, Rules, Say
from plait.study.contender import Contender
from plait.study.job import Job, Kind, Record
from plait.study.places import Here, Place
from plait.study.planning import (
    REPORT_SECONDS,
    Costs,
    Plan,
    Wanted,
    final_cost,
    make_plan,
    makespan,
    read_plan,
    tune_round,
)
from plait.study.results import Comparison, best_trial, make_rows, verdict_of
from plait.study.search import LogGrid, OptunaSearch, Search
from plait.study.sizes import count_parameters, fit_to_budget
from plait.study.store import ADAPTERS, Store
from plait.study.task import Task

PROBE_STEPS = 3
BASE_SHARE = 0.08
"""Of the budget: so long the base is scored. Who comes after is judged by as many examples."""
LEAST_EXAMPLES = 8
MOST_SEEDS = 8
"""Time that is left over buys seeds up to here; more would hardly narrow an interval."""
TUNING_SEED = 0
"""Finals have seeds from 1 on: the one that chose the learning rate is not judged by."""


class BakeOff:
    """One bake-off in one folder; `hold` runs what is left of it."""

    def __init__(
        self,
        task: Task,
        contenders: Sequence[Contender],
        rules: Rules,
        folder: Path,
        place: Place,
        restart: bool = False,
        say: Say = lambda event: None,
    ) -> None:
        self.task, self.rules, self.place, self.say = task, rules, place, say
        self.started = time.time()
        self.named = list(contenders)
        self.folder = folder
        # One base a process: where trials run here, the sizes are fitted on their base.
        self.bench = place.bench if isinstance(place, Here) else Bench(task)
        self.store = Store(folder, self._settings(), restart)
        self.before = float((self.store.plan() or {}).get("spent", 0.0))
        self.tuned: dict[str, list[Record]] = {c.label: [] for c in contenders}
        self.finals: dict[str, list[Record]] = {}
        self.problems: dict[str, str] = {}
        self.probes: dict[str, Record] = {}
        self.plan: Plan | None = None
        self.done, self.examples = 0, 0
        self.ran = False

    def _settings(self) -> dict[str, Any]:
        recipe = self.task.recipe.replace(output="")
        return {
            "task": self.task.name,
            "metric": self.task.metric,
            "methods": [c.label for c in self.named],
            **self.rules.settings(),
            "recipe": recipe.dump(),
            "data": self.task.facts(),
        }

    # -- time -------------------------------------------------------------------------------------

    def spent(self) -> float:
        """Seconds, those of interrupted runs before included."""
        return self.before + time.time() - self.started

    def used(self) -> float:
        """What the bake-off took: to show again what was finished costs nothing of it."""
        return self.spent() if self.ran or not self.before else self.before

    def left(self) -> float:
        return self.rules.budget - self.spent()

    def _until(self, seconds_before_end: float) -> float:
        """The time of day at which so many seconds of the budget are left."""
        return time.time() + self.left() - seconds_before_end

    # -- the whole --------------------------------------------------------------------------------

    def hold(self) -> Comparison:
        contenders = self._sized()
        base = self._base()
        plan = self._planned(contenders, base)
        alive = [c for c in contenders if c.label in plan.steps and c.label not in self.problems]
        self._tune(alive, plan)
        self._finals(self._finalists(alive, plan), plan)
        return self._finish(contenders, base, plan)

    def _sized(self) -> list[Contender]:
        """Every contender at the size nearest to the budget of parameters."""
        wanted = self.rules.parameters
        if wanted is None:
            return self.named
        self._tell("fitting sizes")
        model, shared = self.bench.base(), self.task.recipe
        budget = count_parameters(model, shared) if isinstance(wanted, str) else wanted
        sized = []
        for contender in self.named:
            try:
                sized.append(fit_to_budget(model, contender, shared, budget)[0])
            except (PlaitError, ValueError, RuntimeError) as error:
                self.problems[contender.label] = " ".join(str(error).split())
                sized.append(contender)
        if not isinstance(self.place, Here):
            self.bench = Bench(self.task)  # the workers have bases of their own
        return sized

    def _base(self) -> Record:
        """The base without any adapter: what there is to gain, and what scoring costs."""
        until = time.time() + BASE_SHARE * self.rules.budget
        (record,) = self._run([Job("base", None, "base", deadline=until)])
        if record["state"] != "done":
            raise PlaitError(f"compare: the base cannot be scored: {record.get('reason')}.")
        self.examples = len(record["scores"])
        if record["cut"] and self.examples < LEAST_EXAMPLES:
            raise PlaitError(
                f"compare: {record['score_seconds']:.0f} s, a part of the budget, score only "
                f"{self.examples} test examples; give a longer budget or a quicker metric."
            )
        return record

    # -- the plan ---------------------------------------------------------------------------------

    def _planned(self, contenders: Sequence[Contender], base: Record) -> Plan:
        self._probe([c for c in contenders if c.label not in self.problems])
        stored = self.store.plan()
        if stored is not None and stored.get("plan"):
            self.plan = read_plan(stored["plan"])
        else:
            costs = Costs(
                start={n: _fixed_seconds(r) for n, r in self.probes.items()},
                step={n: r["step_seconds"] for n, r in self.probes.items()},
                validate=base["validate_seconds"],
                score=base["score_seconds"],
            )
            self.plan = make_plan(costs, self._wanted(), self.left())
        self._remember()
        return self.plan

    def _wanted(self) -> Wanted:
        r = self.rules
        return Wanted(
            steps=r.steps or self.task.steps(),
            trials=r.trials,
            seeds=r.seeds,
            finalists=r.finalists,
            equal=r.equal,
            workers=self.place.workers,
            prunes=not r.grid,
        )

    def _probe(self, contenders: Sequence[Contender]) -> None:
        """A few steps of every method: what they cost, and which cannot run at all."""
        rate = math.sqrt(self.rules.lr[0] * self.rules.lr[1])
        jobs = [self._job(c, "probe", rate, TUNING_SEED, PROBE_STEPS) for c in contenders]
        for record in self._run(jobs):
            label = record["label"]
            if record["state"] == "failed":
                self.problems[label] = record["reason"]
            elif record.get("step_seconds") is None or "start_seconds" not in record:
                self.problems[label] = f"the probe {record['state']} within {PROBE_STEPS} steps"
            else:
                self.probes[label] = record
        if not self.probes:
            raise PlaitError(f"compare: no method can run; {next(iter(self.problems.values()))}.")

    # -- tuning -----------------------------------------------------------------------------------

    def _tune(self, contenders: Sequence[Contender], plan: Plan) -> None:
        searches = {c.label: self._search(plan.trials) for c in contenders}
        deadline = self._until(plan.final_seconds + REPORT_SECONDS)
        for number in range(plan.trials):
            jobs = [
                replace(
                    self._job(c, "tune", searches[c.label].ask(), TUNING_SEED, plan.steps[c.label]),
                    rivals=None if self.rules.grid else self._rivals(c.label),
                    deadline=deadline,
                )
                for c in contenders
            ]
            # A round that was finished before an interruption counts, however late it is by now.
            if number and self._missing(jobs) and not self._fits(self._tune_cost(plan), deadline):
                break
            records = list(self._run(jobs))
            if any(r["state"] == "stopped" for r in records):
                break  # a round that not all have finished counts for nobody
            for record in sorted(records, key=lambda r: r["label"]):
                label = record["label"]
                self.tuned[label].append(record)
                rungs = {int(step): value for step, value in record["rungs"].items()}
                searches[label].tell(record["lr"], _final_loss(record), rungs)
        for contender in contenders:
            if not any(r["state"] == "done" for r in self.tuned[contender.label]):
                self.problems[contender.label] = self._why(contender.label)

    def _why(self, label: str) -> str:
        trials = self.tuned[label]
        if not trials:
            return "no round of tuning was finished in time"
        reason = next((r["reason"] for r in trials if "reason" in r), None)
        return reason or f"all {len(trials)} learning rates diverged"

    def _search(self, trials: int) -> Search:
        return (LogGrid if self.rules.grid else OptunaSearch)(self.rules.lr, trials)

    def _rivals(self, label: str) -> dict[int, list[float]]:
        """What this method's earlier trials had on their rungs."""
        found: dict[int, list[float]] = {}
        for record in self.tuned[label]:
            for step, value in record["rungs"].items():
                found.setdefault(int(step), []).append(value)
        return found

    def _tune_cost(self, plan: Plan) -> float:
        """Of a round, by what the rounds before it took."""
        past = [r for records in self.tuned.values() for r in records]
        if not past or plan.costs is None:
            return 0.0
        planned = tune_round(plan.costs, plan.steps, self._wanted())
        by_label = [[r["total_seconds"] for r in rs] for rs in self.tuned.values() if rs]
        return min(planned, makespan((min(t) for t in by_label), self.place.workers))

    # -- finals -----------------------------------------------------------------------------------

    def _finalists(self, contenders: Sequence[Contender], plan: Plan) -> list[Contender]:
        """The methods of least validation loss, as many as were planned."""
        tuned = [(best_trial(self.tuned[c.label]), c) for c in contenders]
        ready = [(best["loss"], c.label, c) for best, c in tuned if best is not None]
        return [c for _, _, c in sorted(ready, key=lambda item: item[:2])][: plan.finalists]

    def _finals(self, contenders: Sequence[Contender], plan: Plan) -> None:
        deadline, chosen = self._until(REPORT_SECONDS / 2), self.rules.seeds
        most = chosen or (plan.seeds if math.isinf(self.rules.budget) else MOST_SEEDS)
        cost = self._final_cost(contenders, plan)
        for seed in range(1, most + 1):
            jobs = [self._final_job(c, plan, seed, deadline) for c in contenders]
            missing = self._missing(jobs)
            # The first round may be tight; each further one must fit by what the last one took.
            if missing and not self._fits(cost if seed > 1 else cost / 2, deadline):
                break
            at = time.time()
            records = list(self._run(jobs))
            if len(missing) == len(jobs):
                cost = time.time() - at
            if any(r["state"] == "stopped" for r in records):
                break
            for record in records:
                if record["state"] == "done":
                    self.finals.setdefault(record["label"], []).append(record)
                else:
                    reason = record.get("reason", record["state"])
                    self.problems[record["label"]] = f"final with seed {seed}: {reason}"
            contenders = [c for c in contenders if c.label not in self.problems]
        for label in self.problems:
            self.finals.pop(label, None)

    def _final_job(self, contender: Contender, plan: Plan, seed: int, deadline: float) -> Job:
        label = contender.label
        best = best_trial(self.tuned[label])
        assert best is not None
        job = self._job(contender, "final", best["lr"], seed, plan.steps[label])
        name = "".join(c if c.isalnum() or c in "-_." else "-" for c in label)
        folder = str(self.folder.resolve() / ADAPTERS / f"{name}-seed{seed}")
        return replace(
            job,
            deadline=deadline,
            folder=None if self.rules.ray else folder,
            examples=self.examples,
        )

    def _final_cost(self, contenders: Sequence[Contender], plan: Plan) -> float:
        if plan.costs is None:
            return 0.0
        costs = plan.costs
        each = [final_cost(costs, plan.steps, c.label) for c in contenders]
        return makespan(each, self.place.workers) if each else 0.0

    def _fits(self, seconds: float, deadline: float) -> bool:
        return time.time() + seconds <= deadline

    # -- running and remembering ------------------------------------------------------------------

    def _job(self, contender: Contender, kind: Kind, lr: float, seed: int, steps: int) -> Job:
        recipe = contender.recipe(self.task.recipe, lr=lr, seed=seed, steps=steps, output="")
        return Job(contender.label, recipe, kind)

    def _missing(self, jobs: Sequence[Job]) -> list[Job]:
        """Those that no run before this one has finished."""
        return [job for job in jobs if self.store.find(job) is None]

    def _run(self, jobs: Sequence[Job]) -> Iterator[Record]:
        """Records in the order of the jobs: from the folder, or run now."""
        found: dict[str, Record] = {}
        for job in jobs:
            if (known := self.store.find(job)) is not None:
                found[job.key] = known
                self._count(known, "done before")
        for record in self.place.run([j for j in jobs if j.key not in found]):
            found[record["key"]] = record
            self.ran = True
            self.store.keep(record)
            self._remember()
            self._count(record, record["state"])
        return iter([found[job.key] for job in jobs])

    def _count(self, record: Record, state: str) -> None:
        self.done += record["kind"] in ("tune", "final")
        rate = f" lr {record['lr']:.3g}" if record["kind"] == "tune" else ""
        seed = f" seed {record['seed']}" if record["kind"] == "final" else ""
        self._tell(f"{record['kind']} {record['label']}{rate}{seed}: {state}")

    def _tell(self, text: str) -> None:
        total = 0
        if self.plan is not None:
            total = len(self.plan.steps) * self.plan.trials + self.plan.finalists * self.plan.seeds
        self.say(Event(text, self.done, max(total, self.done if total else 0), self.left()))

    def _remember(self) -> None:
        plan = None if self.plan is None else self.plan.as_dict()
        self.store.keep_plan({"spent": round(self.used(), 2), "plan": plan})

    # -- the end ----------------------------------------------------------------------------------

    def _finish(self, contenders: Sequence[Contender], base: Record, plan: Plan) -> Comparison:
        from plait.study.report import write_report

        task = self.task
        found = Comparison(
            task={
                "name": task.name,
                "title": task.title,
                "metric": task.metric,
                "higher_is_better": task.higher_is_better,
                "test_examples": len(base["scores"]),
                **task.facts(),
            },
            rows=make_rows(contenders, self.tuned, self.finals, self.probes, self.problems),
            base_score=sum(base["scores"]) / len(base["scores"]),
            verdict=verdict_of(self.finals, task.higher_is_better),
            planned=plan.as_dict() | {"budget": self.rules.budget},
            spent={},
            settings=self._settings() | {"plait": plait.__version__},
            output=self.folder,
        )
        found.advice = advise(found)
        found.spent = self._spent_facts(found)
        found.report = write_report(self.folder / "report.html", found)
        self._remember()
        found.spent["seconds"] = round(self.used(), 1)
        self.store.write("comparison.json", found.as_dict())
        return found

    def _spent_facts(self, found: Comparison) -> dict[str, Any]:
        records = [r for rs in (*self.tuned.values(), *self.finals.values()) for r in rs]
        states = [r["state"] for rs in self.tuned.values() for r in rs]
        return {
            "seconds": round(self.used(), 1),
            "rounds of tuning": max((len(rs) for rs in self.tuned.values()), default=0),
            "pruned": states.count("pruned"),
            "diverged": states.count("diverged"),
            "seeds": max((len(rs) for rs in self.finals.values()), default=0),
            "steps trained": sum(len(r["losses"]) for r in records),
            "workers": self.place.workers,
        }


def _fixed_seconds(probe: Record) -> float:
    """What a trial takes beside its steps."""
    return max(0.0, probe["total_seconds"] - sum(probe["seconds"][-1:]))


def _final_loss(record: Record) -> float | None:
    return record["loss"] if record["state"] == "done" else None
