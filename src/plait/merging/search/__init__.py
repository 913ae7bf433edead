"""Searching coefficients of adapters, by adapter, layer, site or chunk, without merging on the way.

`search` runs a method of the literature (one file each in `methods/`, found by listing that folder)
on attached adapters. Beneath it `Coefficients` is the space, an objective what to lower there, a
front end how (`descend`, `frank_wolfe`, `minimise`), and `Found` the end: coefficients, history and
the merged LoRA.
"""

from plait.merging.search.alignment import alignment
from plait.merging.search.coefficients import Coefficients
from plait.merging.search.derivative_free import evaluate, minimise
from plait.merging.search.driver import search
from plait.merging.search.found import Found
from plait.merging.search.frank_wolfe import frank_wolfe
from plait.merging.search.front import Front
from plait.merging.search.gradient import descend, value_and_gradient
from plait.merging.search.method import (
    Search,
    SearchMethod,
    get_search_method,
    make_search,
    search_method_names,
)
from plait.merging.search.objectives import Objective, entropy, supervised
from plait.merging.search.problem import WANTS, Problem
from plait.merging.search.stored import read_coefficients
from plait.merging.search.trials import Log

__all__ = [
    "WANTS",
    "Coefficients",
    "Found",
    "Front",
    "Log",
    "Objective",
    "Problem",
    "Search",
    "SearchMethod",
    "alignment",
    "descend",
    "entropy",
    "evaluate",
    "frank_wolfe",
    "get_search_method",
    "make_search",
    "minimise",
    "read_coefficients",
    "search",
    "search_method_names",
    "supervised",
    "value_and_gradient",
]
