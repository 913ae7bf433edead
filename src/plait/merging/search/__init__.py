"""Searching coefficients of adapters, by adapter, layer or site, without merging on the way.

`Coefficients` is the space, an objective what to minimise there, a front end how (`descend`,
`frank_wolfe`, `minimise`), and `Found` the end: coefficients, history and the merged LoRA. Methods
of the literature are one file each in `methods/`, found by listing that folder.
"""

from plait.merging.search.coefficients import Coefficients
from plait.merging.search.derivative_free import evaluate, minimise
from plait.merging.search.found import Found
from plait.merging.search.frank_wolfe import frank_wolfe
from plait.merging.search.gradient import descend, value_and_gradient
from plait.merging.search.objectives import Objective, entropy, supervised

__all__ = [
    "Coefficients",
    "Found",
    "Objective",
    "descend",
    "entropy",
    "evaluate",
    "frank_wolfe",
    "minimise",
    "supervised",
    "value_and_gradient",
]
