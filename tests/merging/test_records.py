"""Options arrive where they are given: none has the name of a keyword on their way."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch

import plait
from plait.errors import PlaitError, UnknownNameError
from plait.merging import Merge, MergeMethod, get_merge_method, merge_method_names
from plait.merging.method import make_merge
from plait.merging.search import (
    Search,
    SearchMethod,
    get_search_method,
    make_search,
    search,
    search_method_names,
)

KEYWORDS = {"space", "rank", "energy", "statistics", "seed", "name", "progress", "weights"}


@pytest.mark.parametrize("name", merge_method_names())
def test_no_merge_methods_option_is_a_keyword_of_merge(name: str) -> None:
    method = get_merge_method(name)
    assert not KEYWORDS & {field.name for field in dataclasses.fields(method.merge)}
    make_merge(method, {})


@pytest.mark.parametrize("name", search_method_names())
def test_no_search_methods_option_is_a_keyword_of_search(name: str) -> None:
    taken = {"model", "names", "method", "data", "objective", "metrics", "scores", "seed", "log"}
    fields = {field.name for field in dataclasses.fields(get_search_method(name).search)}
    assert not fields & taken


@pytest.mark.parametrize("word", ["rank", "seed", "space", "energy", "name", "progress", "base"])
def test_a_method_with_such_an_option_is_refused_before_it_runs(word: str) -> None:
    cls = dataclass(type("Clashing", (Merge,), {"__annotations__": {word: float}, word: 1.0}))
    net = torch.nn.Sequential(torch.nn.Linear(3, 3))
    adapter = plait.attach(net, "lora", name="a", targets=["0"])
    with pytest.raises(PlaitError, match=f"has an option '{word}', which is a keyword"):
        plait.merge([adapter], MergeMethod("clashing", "a clash", "none", cls))
    searching = dataclass(type("Clash", (Search,), {"__annotations__": {"log": str}, "log": ""}))
    with pytest.raises(PlaitError, match="has an option 'log', which is a keyword"):
        search(net, ["a"], SearchMethod("clash", "a clash", "none", searching))


def test_a_merge_by_the_name_of_a_search_says_where_it_is() -> None:
    for name in ("adamerging", "fw_merging", "Expert-Merging"):
        with pytest.raises(PlaitError, match="run `plait search --method"):
            get_merge_method(name)
    with pytest.raises(UnknownNameError, match="did you mean 'adamerging'"):
        get_search_method("adamergin")
    with pytest.raises(UnknownNameError, match="unknown option 'learning_rate' in search method"):
        make_search(get_search_method("adamerging"), {"learning_rate": 1})
