"""Which learning rates to try, one after the other, for one method.

    LogGrid        evenly spaced logarithms, from the middle outwards
    OptunaSearch   the same for the first two thirds of the trials, then Optuna's TPE where the
                   best ones lie

Both are deterministic given the answers, so that an interrupted search is resumed by replaying it.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

from plait.errors import PlaitError

Range = tuple[float, float]


class Search(Protocol):
    def ask(self) -> float:
        """The next learning rate."""

    def tell(self, lr: float, loss: float | None, rungs: dict[int, float]) -> None:
        """The validation loss at the end (None: pruned or diverged), and those on the way."""


def spaced(span: Range, count: int) -> list[float]:
    """The middles of `count` even parts of log `span`, from the middle of it outwards."""
    low, high = (math.log(x) for x in span)
    places = [(i + 0.5) / count for i in range(count)]
    order = sorted(places, key=lambda p: (abs(p - 0.5), p))
    return [tidy(math.exp(low + p * (high - low))) for p in order]


def tidy(rate: float) -> float:
    """Three digits are all that a learning rate needs."""
    return float(f"{rate:.3g}")


class LogGrid:
    """Every trial of the plan at its place on a grid."""

    def __init__(self, span: Range, trials: int) -> None:
        self.left = spaced(span, trials)

    def ask(self) -> float:
        return self.left.pop(0)

    def tell(self, lr: float, loss: float | None, rungs: dict[int, float]) -> None:
        pass


class OptunaSearch:
    """Optuna's tree-structured Parzen estimator over log lr, begun with a coarse grid."""

    def __init__(self, span: Range, trials: int, seed: int = 0) -> None:
        optuna = import_optuna()
        first = trials if trials < 5 else math.ceil(2 * trials / 3)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = optuna.samplers.TPESampler(n_startup_trials=first, seed=seed)
        self.study: Any = optuna.create_study(sampler=sampler)
        self.space = {"lr": optuna.distributions.FloatDistribution(*span, log=True)}
        self.pruned = optuna.trial.TrialState.PRUNED
        for rate in spaced(span, first):
            self.study.enqueue_trial({"lr": rate})
        self.asked: dict[float, Any] = {}

    def ask(self) -> float:
        trial = self.study.ask(self.space)
        rate = tidy(trial.params["lr"])
        self.asked[rate] = trial
        return rate

    def tell(self, lr: float, loss: float | None, rungs: dict[int, float]) -> None:
        trial = self.asked.pop(lr)
        for step, value in rungs.items():
            if math.isfinite(value):
                trial.report(value, step)
        if loss is None:
            self.study.tell(trial, state=self.pruned)
        else:
            self.study.tell(trial, loss)


def import_optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise PlaitError(
            "tuning the learning rate needs optuna; run `pip install 'plait[compare]'`, or take "
            "the plain grid (--grid)."
        ) from None
    return optuna
