"""One training run on a base that is shared with those before and after it.

    attach ──► steps (looked at on the rungs, stopped at the deadline) ──► validate ──► score
           ──► detach; a base that is no longer bit for bit what it was is loaded anew

The loop is the one that `plait train` runs through Hugging Face's Trainer: the same data order,
optimiser, rules, clipping and schedule.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plait.adapter import Adapter, RuleStack, attach, detach, get_method, routing, seeds
from plait.adapter.state import find_state
from plait.study.halving import goes_on, rungs
from plait.study.job import Course, Job, Record
from plait.study.memory import Peak
from plait.study.sizes import own_parameters
from plait.study.task import Task
from plait.training.dryrun import attach_arguments, make_rules
from plait.training.recipe import Recipe
from plait.training.trainer import make_initializer


class OutOfTime(Exception):
    """The deadline has passed."""


class Pruned(Exception):
    """Not among the best at a rung."""


class Bench:
    """One base in one process; trials run on it one after the other."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.model: Any = None
        self.print = 0
        self.warm = False

    def run(self, job: Job) -> Record:
        """The trial's record. Errors of the trial are part of it: one contender's trouble must not
        end the others' bake-off."""
        if job.kind == "probe" and not self.warm and job.recipe is not None:
            # Imports and first allocations belong to no method.
            self.warm = True
            self._once(dataclasses.replace(job, recipe=job.recipe.replace(steps=1)))
        return self._once(job)

    def _once(self, job: Job) -> Record:
        started = time.perf_counter()
        model = self.base()
        record: Record = {"key": job.key, "label": job.label, "kind": job.kind}
        course = Course()
        if job.recipe is not None:
            recipe = job.recipe
            record |= {"lr": recipe.lr, "seed": recipe.seed, "steps": recipe.steps}
        try:
            record |= {"state": "done", **self._run(model, job, course)}
        except OutOfTime:
            record |= {"state": "stopped"}
        except Pruned:
            record |= {"state": "pruned"}
        except FloatingPointError:
            record |= {"state": "diverged"}
        except Exception as error:
            record |= {"state": "failed", "reason": f"{type(error).__name__}: {_line(error)}"}
        finally:
            self._restore(time.perf_counter() - started)
        record |= course.as_record()
        record["total_seconds"] = round(time.perf_counter() - started, 3)
        return record

    def base(self) -> nn.Module:
        if self.model is None:
            self.model = self.task.load()
            self.print = checksum(self.model)
        return self.model

    def _restore(self, seconds: float) -> None:
        """Adapters off; where the base was trained or harmed, forget it."""
        model = self.model
        try:
            if find_state(model) is not None:
                detach(model)
            for parameter in model.parameters():
                parameter.grad = None
            intact = checksum(model) == self.print
        except Exception:
            intact = False
        if not intact:
            self.model = None
        # A full collection takes a second beside transformers: too much after a trial of one.
        gc.collect(2 if seconds > 20 else 1)

    def _run(self, model: Any, job: Job, course: Course) -> Record:
        if job.recipe is None:
            return self._measured_base(model, job.deadline)
        recipe, peak, started = job.recipe, Peak(), time.perf_counter()
        torch.manual_seed(recipe.seed)
        adapter = self._attach(model, recipe)
        found: Record = {"start_seconds": round(time.perf_counter() - started, 4)}
        self._train(model, adapter, job, course)
        found["peak_memory"] = peak.read()
        found["parameters"] = _trained(model, adapter)
        model.eval()
        if job.kind == "probe":
            return found
        found["loss"] = self._validate(model)
        if job.kind == "final":
            at = time.perf_counter()
            found["scores"] = [
                round(s, 6)
                for s in itertools.islice(self._scores(model, job.deadline), job.examples)
            ]
            found["score_seconds"] = round(time.perf_counter() - at, 4)
            found["bytes"] = _stored(adapter, found["parameters"], job.folder)
        return found

    def _measured_base(self, model: Any, deadline: float) -> Record:
        """What there is to gain, and what scoring costs. Where time runs out, the scores so far:
        everyone is then judged by these examples."""
        model.eval()
        at = time.perf_counter()
        loss = self._validate(model)
        between, scores, cut = time.perf_counter(), [], False
        try:
            for value in self._scores(model, deadline):
                scores.append(round(value, 6))
        except OutOfTime:
            cut = True
        return {
            "cut": cut,
            "loss": loss,
            "validate_seconds": round(between - at, 4),
            "scores": scores,
            "score_seconds": round(time.perf_counter() - between, 4),
        }

    def _attach(self, model: Any, recipe: Recipe) -> Adapter | None:
        if recipe.method == "none":
            return None
        start = make_initializer(recipe.initializer) or own_initializer(recipe)
        if start is not None:
            inform(start, recipe, given=_given(recipe))
        data = None
        if start is not None and start.needs:
            data = list(
                itertools.islice(self.task.batches(recipe.seed), recipe.initializer_batches)
            )
        return attach(
            model, recipe.method, initializer=start, data=data, **attach_arguments(recipe)
        )

    def _train(self, model: Any, adapter: Adapter | None, job: Job, course: Course) -> None:
        recipe = job.recipe
        assert recipe is not None and recipe.steps is not None
        run = RuleStack(
            model,
            make_rules(recipe),
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            total_steps=recipe.steps,
            seed=recipe.seed,
            validation=self.task.validation_batches(),
        )
        schedule = make_schedule(run.optimizer, recipe)
        watched = rungs(recipe.steps) if job.rivals is not None else []
        model.train()
        batches = itertools.islice(self.task.batches(recipe.seed), recipe.steps)
        for step, batch in enumerate(batches, 1):
            if time.time() > job.deadline:
                raise OutOfTime
            at = time.perf_counter()
            course.losses.append(self._step(model, adapter, recipe, run, schedule, batch, step))
            course.seconds.append(time.perf_counter() - at)
            if step in watched:
                self._look(model, job, course, step)
        run.finish()

    def _step(
        self,
        model: Any,
        adapter: Adapter | None,
        recipe: Recipe,
        run: RuleStack,
        schedule: Any,
        batch: Any,
        step: int,
    ) -> float:
        with context(model, adapter, batch, step - 1):
            loss = self.task.loss(model, batch)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise FloatingPointError
            (loss + run.extra_loss()).backward()
        if recipe.clip > 0:
            trained = [p for group in run.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, recipe.clip)
        run.step()
        schedule.step()
        return value

    def _look(self, model: Any, job: Job, course: Course, step: int) -> None:
        assert job.rivals is not None
        model.eval()
        course.rungs[step] = value = self._validate(model)
        model.train()
        if not goes_on(value, job.rivals.get(step, [])):
            raise Pruned

    @torch.no_grad()
    def _validate(self, model: Any) -> float:
        value = float(self.task.validate(model))
        if not math.isfinite(value):
            raise FloatingPointError
        return value

    def _scores(self, model: Any, deadline: float) -> Iterator[float]:
        # Not inside a generator's own `no_grad`: that would reach its caller between two numbers.
        iterator = iter(self.task.scores(model))
        while True:
            if time.time() > deadline:
                raise OutOfTime
            with torch.no_grad():
                value = next(iterator, None)
            if value is None:
                return
            yield float(value)


def context(
    model: nn.Module, adapter: Adapter | None, batch: Any, step: int
) -> AbstractContextManager[None]:
    """What routers need beside x, as in `plait train`."""
    if adapter is None:
        return nullcontext()
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return routing(
        model, attention_mask=mask if mask is not None and mask.dim() == 2 else None, step=step
    )


def make_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe) -> Any:
    """The recipe's scheduler, as the Trainer makes it."""
    from transformers import get_scheduler

    assert recipe.steps is not None
    return get_scheduler(
        recipe.scheduler,
        optimizer,
        num_warmup_steps=recipe.warmup_steps(recipe.steps),
        num_training_steps=recipe.steps,
    )


def own_initializer(recipe: Recipe) -> Any:
    """A fresh one of the method's own start, or None."""
    kind = get_method(recipe.method).initializer
    return None if kind is None else kind()


def inform(start: Any, recipe: Recipe, given: Mapping[str, Any]) -> None:
    """Tell an initialiser that foresees training (by fields of these names) how that will be."""
    assert recipe.steps is not None
    known = {"lr": recipe.lr, "warmup_steps": max(1, recipe.warmup_steps(recipe.steps))}
    for f in dataclasses.fields(start) if dataclasses.is_dataclass(start) else ():
        if f.name in known and f.name not in given:
            object.__setattr__(start, f.name, known[f.name])


def _given(recipe: Recipe) -> Mapping[str, Any]:
    spec = recipe.initializer
    return next(iter(spec.values())) or {} if isinstance(spec, dict) else {}


def checksum(model: nn.Module) -> int:
    """Of the bits of every parameter and buffer."""
    found = 0
    for _, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        found = seeds.checksum(tensor, found)
    return found


def _trained(model: nn.Module, adapter: Adapter | None) -> int:
    if adapter is None:
        return sum(p.numel() for p in model.parameters() if p.requires_grad)
    return own_parameters(adapter)


def _stored(adapter: Adapter | None, parameters: int, folder: str | None) -> int:
    """Bytes of the adapter's folder; it stays where `folder` says."""
    if adapter is None:
        return 4 * parameters
    place = Path(tempfile.mkdtemp()) if folder is None else Path(folder)
    try:
        adapter.save(place / "adapter" if folder is None else place)
        return sum(f.stat().st_size for f in place.rglob("*") if f.is_file())
    finally:
        if folder is None:
            shutil.rmtree(place, ignore_errors=True)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
