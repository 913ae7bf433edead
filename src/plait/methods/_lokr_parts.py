"""The parts of LoKr's two factors: what a site has, and the factors they make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plait.adapter import Site
from plait.methods._modes import near_factors
from plait.methods._tucker import has_core, tucker_product

Shapes = dict[str, tuple[int, ...]]


def lokr_shapes(site: Site, options: Any) -> Shapes:
    """The parameters at a site; a kernel is unrolled into the columns of w2, or stands in t2."""
    channels = site.details["kernel"][0] if site.kind == "conv" else site.in_features
    (o1, o2), (i1, i2) = (near_factors(n, options.factor) for n in (site.out_features, channels))
    r, columns = options.rank, i2 * (site.in_features // channels)
    first: Shapes = {"w1": (o1, i1)}
    if options.decompose_both and r < max(o1, i1) / 2:
        first = {"w1_a": (o1, r), "w1_b": (r, i1)}
    if r >= max(o2, i2) / 2:
        return first | {"w2": (o2, columns)}
    if options.tucker and has_core(site):
        core = (r, r, *site.details["kernel"][1:])
        return first | {"w2_a": (r, o2), "w2_b": (r, i2), "t2": core}
    return first | {"w2_a": (o2, r), "w2_b": (r, columns)}


def whole_factor(parts: Mapping[str, Tensor | None], name: str) -> Tensor:
    """w1 or w2 from its parts."""
    full, t = parts.get(name), parts.get("t2") if name == "w2" else None
    if full is not None:
        return full
    a, b = parts[f"{name}_a"], parts[f"{name}_b"]
    assert a is not None and b is not None
    return a @ b if t is None else tucker_product(t, a, b)
