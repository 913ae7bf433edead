"""One paragraph of advice, computed from the results: what to take, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import pstdev

from plait.study.results import Comparison, Row

CHEAPER = 0.9
"""A method must cost less than nine tenths of another to be called cheaper."""


def advise(found: Comparison) -> str:
    """Take the winner; or, where differences lie within noise, the cheapest of the best."""
    verdict, metric = found.verdict, found.task["metric"]
    scored = [row for row in found.rows if row.score is not None]
    if verdict is None or not scored:
        return "No method could be scored within the budget: give more time or fewer methods."
    said = [_choice(found, scored, metric)]
    said.append(_beside_base(found))
    edges = [row.label for row in scored if row.at_edge]
    if edges:
        rates = "rate" if len(edges) == 1 else "rates"
        said.append(
            f"Best learning {rates} at the edge of what was tried: {_list(edges)}; more trials or "
            "a wider --lr may do better."
        )
    said.append(_sensitivity(found, scored))
    if (share := _parameter_spread(scored)) > 1.25:
        said.append(
            f"Numbers of parameters differ by up to {round(share, 1 if share < 10 else None):,} x: "
            "not every size can be matched."
        )
    if failed := [row.label for row in found.rows if row.problem]:
        said.append(f"Did not run: {_list(failed)}; the table says why.")
    return " ".join(filter(None, said))


def _choice(found: Comparison, scored: Sequence[Row], metric: str) -> str:
    verdict = found.verdict
    assert verdict is not None
    if len(scored) == 1:
        return f"Only {scored[0].label} was scored: there is nothing to compare it with."
    if math.isnan(verdict.differences[0].interval.low):
        return (
            f"{verdict.leader} leads in {metric}, but one seed cannot tell a difference from "
            "chance: give a longer budget or --seeds 3."
        )
    if verdict.winner is not None:
        second = verdict.against_leader(_second(found))
        assert second is not None
        return (
            f"Take {verdict.winner}: its {metric} is better than that of every other method, the "
            f"next ({second.b}) by {second.interval} (p = {second.adjusted:.2g} after Holm's "
            "correction)."
        )
    tied = [row for row in scored if row.label in verdict.tied]
    whole = "all methods" if len(tied) == len(scored) else _list([r.label for r in tied])
    said = f"Differences in {metric} between {whole} lie within noise: no winner."
    doubtful = [row.label for row in tied if _looks_worse(found, row.label)]
    if doubtful:
        verb = "looks" if len(doubtful) == 1 else "look"
        said += f" {_list(doubtful)} {verb} worse all the same, though not for certain."
    return f"{said} {_cheapest([row for row in tied if row.label not in doubtful])}"


def _looks_worse(found: Comparison, label: str) -> bool:
    """Whether the pair by itself, without the correction for many, says worse than the leader:
    too little for a verdict, too much to be advised to take it because it is cheap."""
    assert found.verdict is not None
    pair = found.verdict.against_leader(label)
    return pair is not None and pair.interval.low > 0


def _beside_base(found: Comparison) -> str:
    """A word of warning where even the leader is no better than no adapter at all."""
    assert found.verdict is not None
    base, leader = found.base_score, found.verdict.means[found.verdict.leader]
    sign = 1 if found.task["higher_is_better"] else -1
    if base is None or sign * (leader - base) > 0:
        return ""
    return (
        f"None is better than the base alone ({base:.3g}): the trials may be too short, so give "
        "a longer budget before choosing."
    )


def _second(found: Comparison) -> str:
    assert found.verdict is not None
    order = [row.label for row in found.ranked() if row.score is not None]
    return next(label for label in order if label != found.verdict.leader)


def _cheapest(tied: Sequence[Row]) -> str:
    if len(tied) == 1:
        return f"Take {tied[0].label}, which leads."
    fastest = min(tied, key=lambda r: r.train_seconds or math.inf)
    smallest = min(tied, key=lambda r: r.parameters or math.inf)
    quick = _below([r.train_seconds for r in tied], fastest.train_seconds)
    small = _below([r.parameters for r in tied], smallest.parameters)
    if not quick and not small:
        return f"They cost the same too: take the one you know ({tied[0].label} will do)."
    if quick and small and fastest is smallest:
        return f"Take the cheapest, {fastest.label}: the quickest to train and the smallest."
    said = []
    if quick and fastest.train_seconds is not None:
        said.append(f"the quickest to train is {fastest.label} ({fastest.train_seconds:.3g} s)")
    if small and smallest.parameters is not None:
        said.append(f"the smallest is {smallest.label} ({smallest.parameters:,} parameters)")
    return f"Take the cheapest: {', and '.join(said)}."


def _below(values: Sequence[float | None], least: float | None) -> bool:
    """Whether the least is well below the middle of the others."""
    known = sorted(v for v in values if v is not None)
    return least is not None and len(known) > 1 and least < CHEAPER * known[len(known) // 2]


def _sensitivity(found: Comparison, scored: Sequence[Row]) -> str:
    """How much the rate matters beside the method, in validation loss at the end of training."""
    within = [
        pstdev(losses)
        for row in scored
        if len(losses := [r["loss"] for r in row.rates if r.get("loss") is not None]) > 1
    ]
    between = [
        min(r["loss"] for r in row.rates if r.get("loss") is not None)
        for row in scored
        if any(r.get("loss") is not None for r in row.rates)
    ]
    lost = sum(r["state"] == "diverged" for row in scored for r in row.rates)
    if 2 * len(within) < len(scored) or len(between) < 2 or (spread := pstdev(between)) == 0:
        return ""
    ratio = (sum(within) / len(within)) / spread
    if ratio < 1.5:
        return ""
    more = f" ({lost} trials diverged besides)" if lost else ""
    return (
        f"The learning rate mattered more than the method: validation losses spread {ratio:.2g} "
        f"times as much over the rates tried as over the tuned methods{more}."
    )


def _parameter_spread(rows: Sequence[Row]) -> float:
    counts = [row.parameters for row in rows if row.parameters]
    return max(counts) / min(counts) if counts else 1.0


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
