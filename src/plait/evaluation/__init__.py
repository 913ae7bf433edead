"""Evaluation: how well adapters answer, and what is in them.

`evaluate` asks a model, `inspect_adapter` looks at the weights.
"""

from plait.evaluation.calibration import ace, ece, mce, reliability_plot
from plait.evaluation.driver import evaluate
from plait.evaluation.inspection import (
    AdapterReport,
    Inspection,
    IntruderSearch,
    SiteReport,
    inspect_adapter,
    inspect_adapters,
    write_inspection,
)
from plait.evaluation.intervals import bootstrap, wilson
from plait.evaluation.question import Question, read_questions
from plait.evaluation.results import Evaluation, Result, Score

__all__ = [
    "AdapterReport",
    "Evaluation",
    "Inspection",
    "IntruderSearch",
    "Question",
    "Result",
    "Score",
    "SiteReport",
    "ace",
    "bootstrap",
    "ece",
    "evaluate",
    "inspect_adapter",
    "inspect_adapters",
    "mce",
    "read_questions",
    "reliability_plot",
    "wilson",
    "write_inspection",
]
