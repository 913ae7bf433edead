"""The laboratory of benchmarks/claims: small real tasks, tuned trials, verdicts, one page.

A claim is a script of its own beside this folder; it says what a paper claims, on which task and
with which contenders it is tried, and how the outcome is judged. All of that is fixed before the
run. See `claim.py` for the record, `tasks.py` for the tasks, `trial.py` for one training run.
"""

from lab.claim import Claim, main
from lab.contender import Contender
from lab.timing import cpu_seconds, paired_ratio
from lab.verdict import Verdict, at_most, compare, figures

__all__ = [
    "Claim",
    "Contender",
    "Verdict",
    "at_most",
    "compare",
    "cpu_seconds",
    "figures",
    "main",
    "paired_ratio",
]
