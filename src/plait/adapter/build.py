"""Building an adapter's deltas from a method, sites and options; shared by attach and the file
readers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from plait.adapter import registry
from plait.adapter.adapter import Adapter, DeltaMap
from plait.adapter.delta import Build, Delta
from plait.adapter.method import Method
from plait.adapter.shared import SharedTensors
from plait.adapter.site import Site
from plait.errors import PlaitError, nearest, unknown

Overrides = Mapping[str, Mapping[str, Any]]
"""{site pattern: {option: value}}: options that differ at some sites."""

_NAME = re.compile(r"[A-Za-z0-9_\-]+")


def check_name(name: str) -> str:
    """Adapter names become module names: letters, digits, `_` and `-` only."""
    if not _NAME.fullmatch(name):
        raise PlaitError(f"adapter name {name!r} may hold only letters, digits, '_' and '-'.")
    return name


def make_options(method: Method, given: Mapping[str, Any]) -> Any:
    """The method's options from keywords; an unknown one is an error naming the nearest."""
    fields = {f.name for f in dataclasses.fields(method.options)}
    for name in given:
        if name not in fields:
            raise unknown("option", name, fields, where=f"method {method.name!r}")
    return method.options(**given)


def site_matches(pattern: str, path: str) -> bool:
    """PEFT's rule for rank_pattern keys: the path itself, its ending, or a regex of its ending."""
    if path == pattern or path.endswith("." + pattern):
        return True
    try:
        # A leading ^ anchors the whole path; without one any ending after a dot may match.
        body = pattern[1:] if pattern.startswith("^") else rf"(?:.*\.)?(?:{pattern})"
        return re.fullmatch(body.removesuffix("$"), path) is not None
    except re.error as e:
        raise PlaitError(f"pattern {pattern!r} is not a regular expression: {e}.") from None


def options_by_site(sites: Sequence[Site], options: Any, overrides: Overrides) -> dict[str, Any]:
    """Each site's options; a pattern that matches no site is an error. First match wins."""
    known = {f.name for f in dataclasses.fields(options)}
    for pattern, given in overrides.items():
        for name in given:
            if name not in known:
                raise unknown("option", name, known, where=f"the override {pattern!r}")
        if not any(site_matches(pattern, s.path) for s in sites):
            guess = nearest(pattern, [s.path.rpartition(".")[2] for s in sites])
            hint = f"did you mean {guess!r}?" if guess else f"sites look like {sites[0].path!r}."
            raise PlaitError(f"override pattern {pattern!r} matches no targeted site; {hint}")
    chosen = {}
    for site in sites:
        match = next((o for p, o in overrides.items() if site_matches(p, site.path)), {})
        chosen[site.path] = dataclasses.replace(options, **match) if match else options
    return chosen


def build_adapter(
    name: str,
    method: str | Method,
    pieces: Sequence[tuple[Site, type[Delta]]],
    options: Any,
    *,
    by_site: Mapping[str, Any] | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    info: Mapping[str, Any] | None = None,
) -> Adapter:
    """An adapter with allocated (not yet started) deltas, attached to nothing.

    `dtype` None means float32, or the base's own where that is float64.
    """
    method = registry.get_method(method)
    check_name(name)
    sites = [site for site, _ in pieces]
    device = sites[0].device if sites and sites[0].module is not None else torch.device("cpu")
    own = dtype or (_adapter_dtype(sites[0]) if sites else torch.float32)
    shared = SharedTensors(seed, own, device)
    for cls in dict.fromkeys(cls for _, cls in pieces):
        cls.prepare([s for s, c in pieces if c is cls], options, shared)
    deltas = DeltaMap()
    for site, cls in pieces:
        here = site.device if site.module is not None else device
        build = Build(seed, shared, dtype or _adapter_dtype(site), here)
        deltas[site.path] = cls(site, (by_site or {}).get(site.path, options), build)
    return Adapter(name, method, options, deltas, shared, seed, dict(info or {}))


def _adapter_dtype(site: Site) -> torch.dtype:
    if site.module is None:
        return torch.float32
    inner = site.kind == "module"  # a block has no tensors of its own
    wide = any(p.dtype == torch.float64 for p in site.module.parameters(recurse=inner))
    return torch.float64 if wide else torch.float32


def choose_deltas(
    method: Method, model: Any, sites: Sequence[Site] | None, options: Any
) -> list[tuple[Site, type[Delta]]]:
    """(site, delta class) pairs: the method's own choice, or its one delta at every site."""
    if method.choose is not None and sites is None:
        return method.choose(model, options)
    if method.delta is None:
        raise PlaitError(
            f"method {method.name!r} is a {method.axis}, not something to attach on its own; "
            f"combine it with a parameterisation, for example in a recipe: rules: [{method.name}]."
        )
    assert sites is not None
    return [(site, method.delta) for site in sites]
