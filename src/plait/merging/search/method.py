"""What a search method is, and finding methods by listing their folder.

    Problem (adapters on a model, what is known of the tasks) ──► Search.find ──► Found

A method is a dataclass of its options; what it must know of the tasks it says in `wants`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from plait.errors import PlaitError
from plait.merging.records import Folder, keywords, make_options
from plait.merging.search.coefficients import Coefficients
from plait.merging.search.found import Found
from plait.merging.search.groups import Along, Grouping
from plait.merging.search.problem import Problem, Wants

Self = TypeVar("Self", bound="Search")


class Search:
    """One way to search. Subclasses are dataclasses whose fields are the options."""

    wants: Wants = "loss"
    """What it must know of the tasks (see `plait.merging.search.problem`)."""
    gradient: bool = False
    """Whether it follows gradients, which what it lowers must then have."""
    packages: tuple[str, ...] = ()
    """Those of the extra `search` that it needs with these options."""

    def find(self, problem: Problem) -> Found:
        raise NotImplementedError

    def within(self: Self, evaluations: int) -> Self:
        """The same search with so many evaluations (a value with its gradient counts as one)."""
        least, names = 2, {f.name for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        if evaluations < least:
            raise PlaitError(
                f"a budget of {evaluations} evaluations is too small; at least {least}."
            )
        spent = (
            {"evaluations": evaluations} if "evaluations" in names else {"steps": evaluations - 1}
        )
        return dataclasses.replace(self, **spent)  # type: ignore[type-var]


@dataclass
class Grouped(Search):
    """A search whose user chooses how finely coefficients are shared."""

    grouping: Grouping = "layer"
    """What shares a coefficient: all of an "adapter", a "layer", or nothing ("site")."""
    chunks: int | Mapping[str, int] = 1
    """Even pieces of each site's rows (or columns) with coefficients of their own, for all sites or
    as {site pattern: pieces}; 0 pieces hold a site at the start."""
    along: Along = "rows"
    """Pieces of "rows" or "columns"."""

    def space(self, problem: Problem, **more: Any) -> Coefficients:
        """The coefficients; `more` is of form, start and bounds."""
        given: dict[str, Any] = {"grouping": self.grouping, "chunks": self.chunks}
        given |= {"along": self.along} | more
        return Coefficients(problem.model, problem.names, **given)


@dataclass(frozen=True)
class SearchMethod:
    """The record that a method's file ends in."""

    name: str
    title: str
    paper: str
    search: type[Search]


FOLDER = Folder("plait.merging.search.methods", SearchMethod, "search method")


def search_method_names() -> list[str]:
    """Every search method's name, sorted."""
    return FOLDER.names()


def get_search_method(name: str) -> SearchMethod:
    """The search method of that name (underscores count as hyphens); an error names the nearest,
    or says that the method is one that merges without data."""
    from plait.merging.method import merge_method_names

    key = name.lower().replace("_", "-")
    if key not in FOLDER.files and key in merge_method_names():
        raise PlaitError(f"{key} merges without data: run `plait merge --method {key}`.")
    return FOLDER.get(name)


def make_search(method: SearchMethod, given: Mapping[str, Any]) -> Search:
    """The method with its options, `given` over the defaults; an unknown one names the nearest."""
    from plait.merging.search.driver import search

    return make_options(f"search method {method.name!r}", method.search, given, keywords(search))
