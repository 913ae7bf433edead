"""Further names, from PEFT, mergekit and papers, of a method with some options set."""

from __future__ import annotations

from typing import Any

ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "aswudi": ("wudi", {"solver": "exact", "keep": "adaptive"}),
    "average": ("linear", {}),
    "breadcrumbs-ties": ("breadcrumbs", {"elect": True}),
    "cat": ("linear", {}),
    "dare-linear": ("dare", {}),
    "dare-ties": ("dare", {"elect": True}),
    "della-linear": ("della", {"elect": False}),
    "magnitude-prune": ("breadcrumbs", {"gamma": 0.0}),
    "naive-mc": ("damc", {}),
    "svd": ("linear", {}),
    "swudi": ("wudi", {"keep": 0.65}),
    "task-arithmetic": ("linear", {}),
    "tsv-m": ("tsv", {}),
}
"""{name: (method, options)}. Weights are a merge's own matter: `average` leaves them at 1 / k, task
arithmetic gives each input lambda. `svd` is the exact sum, cut with rank= or energy=."""
