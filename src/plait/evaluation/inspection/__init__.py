"""Inspection: what is in an adapter, what is wrong with it, and how it differs from others.

Read `inspecting` first (the pass over the sites), then `measure` (one site), `health` (the checks),
`intruders` and `similarity`; `base` reads W, `savings` counts bytes; `tables`, `plots` and `files`
show it all.
"""

from plait.evaluation.inspection.files import write_inspection
from plait.evaluation.inspection.inspecting import Inspection, inspect_adapter, inspect_adapters
from plait.evaluation.inspection.intruders import IntruderSearch, find_intruders
from plait.evaluation.inspection.report import (
    CHECKS,
    AdapterReport,
    Finding,
    Intruders,
    Savings,
    SiteReport,
)
from plait.evaluation.inspection.similarity import Pair, Similarities, SitePair

__all__ = [
    "CHECKS",
    "AdapterReport",
    "Finding",
    "Inspection",
    "IntruderSearch",
    "Intruders",
    "Pair",
    "Savings",
    "Similarities",
    "SitePair",
    "SiteReport",
    "find_intruders",
    "inspect_adapter",
    "inspect_adapters",
    "write_inspection",
]
