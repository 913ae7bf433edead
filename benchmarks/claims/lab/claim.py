"""A claim and its trial: tune every contender's learning rate, repeat it with every seed, judge,
store.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lab.contender import Contender
from lab.store import RESULTS, remembered, write
from lab.tasks import TASKS
from lab.trial import run_trial
from lab.verdict import Outcome, Verdict


@dataclass(frozen=True)
class Claim:
    """What a paper says and how it is tried here; nothing in it depends on the outcome.

    Attributes:
        slug: the system's name, as in `plait methods`.
        paper: authors, year, arXiv number.
        statement: the headline, in our words.
        judge: from the outcome (see `Claim.run`) to a verdict.
        task: one of `lab.tasks.TASKS`, for claims about learning.
        contenders: the sides; learning rates are tuned for every one of them.
        measure: for claims about time, memory or size: figures, given a flag that asks for a
            quick run. They stand in the outcome under "measured".
        steps: of every run; None is the task's.
        seeds: the learning rate is chosen with the first, figures are over all.
        note: anything a reader of the page should know about the setting.
    """

    slug: str
    paper: str
    statement: str
    judge: Callable[[Outcome], Verdict]
    task: str = ""
    contenders: Sequence[Contender] = ()
    measure: Callable[[bool], dict[str, Any]] | None = None
    steps: int | None = None
    seeds: Sequence[int] = (0, 1, 2)
    note: str = ""
    smoke: bool = field(default=False, compare=False)

    def run(self) -> dict[str, Any]:
        """{"contenders": {label: {"rate", "rates", "trials", "parameters"}}, "measured": {...}}."""
        found: dict[str, Any] = {"contenders": {}, "measured": {}}
        for contender in self.contenders:
            found["contenders"][contender.label] = self._tune(contender)
        if self.measure is not None:
            found["measured"] = self.measure(self.smoke)
        return found

    def _tune(self, contender: Contender) -> dict[str, Any]:
        """Every rate with the first seed; the one of least validation loss (or, where the task
        says so, of most accuracy) with every seed.

        Where the best stands at the edge of the rates, up to two more are tried beyond it.
        """
        if len(contender.rates) < 4:
            raise SystemExit(f"{contender.label}: a fair trial takes at least four rates")
        losses = {}
        for rate in contender.rates[:1] if self.smoke else contender.rates:
            losses[rate] = self._loss(contender, rate)
        while not self.smoke and (further := _beyond(losses)) is not None:
            losses[further] = self._loss(contender, further)
        best = _best(losses)
        seeds = self.seeds[:1] if self.smoke else self.seeds
        trials = [self._trial(contender, best, seed) for seed in seeds]
        return {
            "rate": best,
            "rates": {f"{rate:g}": loss for rate, loss in losses.items()},
            "trials": trials,
            "parameters": trials[0]["parameters"],
        }

    def _loss(self, contender: Contender, rate: float) -> float:
        found = self._trial(contender, rate, self.seeds[0])["validation"]
        return 1 - found["accuracy"] if TASKS[self.task].tuned_by == "accuracy" else found["loss"]

    def _trial(self, contender: Contender, rate: float, seed: int) -> dict[str, Any]:
        task = TASKS[self.task]
        steps = 5 if self.smoke else self.steps or task.steps
        work = lambda: run_trial(task, contender, rate, seed, steps)  # noqa: E731
        _say(f"{self.slug}: {contender.label} at {rate:g}, seed {seed}")
        if self.smoke:
            return work()
        return remembered(contender.key(task=task.name, rate=rate, seed=seed, steps=steps), work)


def _best(losses: dict[float, float]) -> float:
    return min(losses, key=lambda rate: (math.isnan(losses[rate]), losses[rate]))


def _beyond(losses: dict[float, float], most: int = 6) -> float | None:
    """The next rate outward while the best one stands at the grid's edge, up to `most` in all."""
    best = _best(losses)
    if len(losses) >= most or min(losses) < best < max(losses):
        return None
    return float(f"{best * 3.2 if best == max(losses) else best / 3.2:.1g}")


def main(claim: Claim) -> None:
    """Run a claim as a script: `python benchmarks/claims/<slug>.py [--smoke]`."""
    parser = argparse.ArgumentParser(description=f"{claim.slug}: {claim.statement}")
    parser.add_argument("--smoke", action="store_true", help="a few steps, nothing stored")
    torch.set_num_threads(1)
    arguments = parser.parse_args()
    claim = dataclasses.replace(claim, smoke=arguments.smoke)
    start = time.process_time()
    outcome = claim.run()
    verdict = claim.judge(outcome)
    _say("")
    print(f"{claim.slug}: {verdict.outcome}. {verdict.reason}")
    if not claim.smoke:
        spent = round(time.process_time() - start, 1)
        write(RESULTS / f"{claim.slug}.json", _stored(claim, outcome, verdict, spent))


def _stored(claim: Claim, outcome: dict[str, Any], verdict: Verdict, seconds: float) -> Any:
    """What is kept: settings, figures, verdict; of the curves every tenth value."""
    contenders = json.loads(json.dumps(outcome["contenders"]))
    for side in contenders.values():
        for trial in side["trials"]:
            trial["curve"] = trial["curve"][::10]
    return {
        "slug": claim.slug,
        "paper": claim.paper,
        "statement": claim.statement,
        "task": TASKS[claim.task].title if claim.task else "",
        "steps": (claim.steps or TASKS[claim.task].steps) if claim.task else 0,
        "seeds": list(claim.seeds),
        "settings": {
            c.label: {k: v for k, v in dataclasses.asdict(c).items() if k != "label"}
            for c in claim.contenders
        },
        "note": claim.note,
        "outcome": verdict.outcome,
        "reason": verdict.reason,
        "contenders": contenders,
        "measured": outcome["measured"],
        "seconds": seconds,
    }


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
