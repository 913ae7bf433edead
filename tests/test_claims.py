"""The laboratory of claims: its verdicts, the form of every claim, and the page made of results."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CLAIMS = ROOT / "benchmarks" / "claims"
sys.path.insert(0, str(CLAIMS))

from lab import Claim, Contender, compare  # noqa: E402
from lab.tasks import TASKS  # noqa: E402
from lab.verdict import CONTRADICTED, NOT_SHOWN, SHOWN, all_of, at_most  # noqa: E402

SCRIPTS = sorted(p.stem for p in CLAIMS.glob("*.py") if p.stem not in ("page", "run_all"))


def outcome(**losses: list[float]) -> dict:
    return {
        "contenders": {
            name: {"trials": [{"test": {"loss": v, "accuracy": 1 - v}} for v in values]}
            for name, values in losses.items()
        }
    }


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ([0.10, 0.11, 0.12], [0.30, 0.31, 0.32], SHOWN),
        ([0.30, 0.31, 0.32], [0.10, 0.11, 0.12], CONTRADICTED),
        ([0.10, 0.40, 0.20], [0.20, 0.20, 0.25], NOT_SHOWN),
        # Paired seeds: a small gain that every seed shows counts, however far seeds lie apart.
        ([0.10, 0.50, 0.90], [0.12, 0.521, 0.919], SHOWN),
    ],
)
def test_a_verdict_needs_the_whole_interval(ours, theirs, verdict) -> None:
    found = outcome(a=ours, b=theirs)
    assert compare(found, "a", "b").outcome == verdict
    assert compare(found, "a", "b", "accuracy").outcome == verdict


def test_a_margin_is_allowed_and_named() -> None:
    found = outcome(a=[0.31, 0.32, 0.33], b=[0.30, 0.31, 0.32])
    assert compare(found, "a", "b").outcome == CONTRADICTED
    allowed = compare(found, "a", "b", margin=0.1)
    assert allowed.outcome == SHOWN and "0.1 allowed" in allowed.reason


def test_a_claim_is_worth_its_weakest_part() -> None:
    parts = [at_most(1.0, 2.0, "size"), at_most(3.0, 2.0, "time")]
    assert all_of(*parts).outcome == CONTRADICTED


def test_a_contender_is_stored_by_what_it_runs_and_not_by_its_label() -> None:
    same = Contender("x", "lora", {"rank": 2}), Contender("y", "lora", {"rank": 2}, rates=(1.0,))
    other = Contender("x", "lora", {"rank": 4})
    where = {"task": "t", "rate": 0.1, "seed": 0}
    assert same[0].key(**where) == same[1].key(**where) != other.key(**where)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_claim_is_fair(script: str) -> None:
    claim = importlib.import_module(script).CLAIM
    assert isinstance(claim, Claim)
    assert claim.slug == script.replace("_", "-")
    assert claim.contenders or claim.measure is not None
    if claim.contenders:
        assert claim.task in TASKS
        assert len(claim.seeds) >= 3
        assert all(len(set(c.rates)) >= 4 for c in claim.contenders)
        labels = [c.label for c in claim.contenders]
        assert len(labels) == len(set(labels))


def test_the_page_is_what_the_results_say() -> None:
    page = importlib.import_module("page")
    stored = page.load()
    assert stored, "run benchmarks/claims/run_all.py"
    assert (ROOT / "docs" / "claims.md").read_text(encoding="utf-8") == page.page(stored)


def test_the_grid_grows_where_its_edge_is_best() -> None:
    from lab.claim import _beyond

    assert _beyond({1e-3: 1.0, 3e-3: 0.5, 1e-2: 0.4, 3e-2: 0.9}) is None
    assert _beyond({1e-3: 1.0, 3e-3: 0.5, 1e-2: 0.4, 3e-2: 0.3}) == pytest.approx(0.1)
    assert _beyond({1e-3: 0.1, 3e-3: 0.5, 1e-2: 0.4, 3e-2: float("nan")}) == pytest.approx(3e-4)
    assert _beyond({1e-3: 1, 3e-3: 0.9, 1e-2: 0.8, 3e-2: 0.7, 0.1: 0.6, 0.3: 0.5}) is None
