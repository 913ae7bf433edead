"""Who enters: every merge method by name, forms of some that the literature compares, searches.

A method that is added to the library enters by itself, with a factor on its result to tune; a knob
worth tuning is named in `KNOBS`, what a call needs beyond its experts in `needs_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from plait.merging import get_merge_method, merge_method_names

KNOBS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "breadcrumbs": ("density", (0.9, 0.5, 0.3)),
    "consensus-ta": ("threshold", (0.2, 0.4, 0.6)),
    "dare": ("density", (0.5, 0.2, 0.8)),
    "della": ("density", (0.5, 0.3, 0.8)),
    "iso-c": ("flatten", (1.0, 0.7, 0.4)),
    "iso-cts": ("common", (0.8, 0.5, 0.95)),
    "knots": ("options", ({"density": 0.2}, {"density": 0.5}, {"density": 0.1})),
    "localize-stitch": ("density", (0.1, 0.3, 0.6)),
    "lora-lego": ("clusters", (None, 16, 32)),
    "opcm": ("alpha", (0.5, 0.2, 0.8)),
    "regmean": ("shrink", (0.9, 0.5, 1.0)),
    "sce": ("density", (0.1, 0.3, 0.7)),
    "ties": ("density", (0.2, 0.5, 0.1)),
    "tsv": ("kept", (None, 4, 2)),
    "zip-lora": ("overlap", (0.01, 0.1, 0.0)),
}
"""{method: (option, values to try, the default first)}: at most three, as the budget is small."""

SEARCHES: dict[str, tuple[int, dict[str, Any]]] = {
    "adamerging": (16, {"lr": 0.03, "grouping": "adapter"}),
    "expert-merging": (16, {}),
    "fw-merging": (16, {"scale": 2.4}),
    "lora-soups": (16, {"lr": 0.1, "form": "free"}),
    "lorahub": (32, {}),
    "m2n2": (32, {"grouping": "adapter"}),
    "map": (48, {}),
    "octo-planner": (8, {}),
}
"""{search: (evaluations, options)}: rates are such that so few steps can move anything, and a hull
whose weights add up to 1 is made so large that its middle has the customary 0.3 of each of eight
experts."""


@dataclass(frozen=True)
class Contender:
    """A merge as it enters: `options` go to `plait.merge` as they are.

    Attributes:
        label: its name in tables.
        method: of the library.
        knob: (option, values), the default first; None where only the factor is tuned.
        tuned: whether it is tuned at all; if not, it is taken as it comes.
        own: options for one task's input, where the merge is asked with the task known.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    knob: tuple[str, tuple[Any, ...]] | None = None
    tuned: bool = True
    own: Callable[[int, int], Mapping[str, Any]] | None = None

    @property
    def knobs(self) -> Sequence[Any]:
        return self.knob[1] if self.knob else (None,)

    def at(self, knob: Any) -> dict[str, Any]:
        """The options with the knob set."""
        return {**self.options, **({self.knob[0]: knob} if self.knob else {})}


def contenders() -> list[Contender]:
    """Every merge method, then the forms."""
    found = [Contender("average", "linear", tuned=False)]
    found += [Contender(name, name, knob=KNOBS.get(name)) for name in merge_method_names()]
    return [*found, *_forms()]


def _forms() -> list[Contender]:
    def one_hot(i: int, k: int) -> dict[str, Any]:
        return {"gates": [float(i == j) for j in range(k)]}

    def alone(i: int, k: int) -> dict[str, Any]:
        return {"weights": [float(i == j) for j in range(k)]}

    ties = KNOBS["ties"]
    return [
        Contender("ties, entries of dW", "ties", {"space": "delta"}, ties),
        Contender("dare, entries of dW", "dare", {"space": "delta"}, KNOBS["dare"]),
        Contender("dare-ties", "dare", {"elect": True, "space": "aligned"}, KNOBS["dare"]),
        Contender(
            "dare alone, a tenth kept",
            "dare",
            # At full rank, so that nothing but the dropping counts.
            {"density": 0.1, "space": "delta", "rank": 384},
            tuned=False,
            own=alone,
        ),
        Contender("emr, task known", "emr", tuned=False, own=lambda i, k: {"input": i}),
        Contender(
            "consensus-ta, task known",
            "consensus-ta",
            tuned=False,
            own=lambda i, k: {"input": i, "scale": float(k)},
        ),
        Contender("twin, task known, rank 2", "twin", {"residual": 2}, tuned=False, own=one_hot),
    ]


def needs_of(method: str) -> frozenset[str]:
    """The statistics of data that the method wants with its defaults."""
    return frozenset(get_merge_method(method).merge().needs)
