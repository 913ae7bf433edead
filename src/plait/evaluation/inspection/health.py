"""What is wrong with an adapter: each check looks at reports and says what it finds in plain words.

Sizes are judged by their logarithms, against what the other sites lead one to expect, with medians
throughout, so that the damage itself does not set the measure. A site's size is that of the module
of its name plus that of its layer; what is left over is compared with 1.4826 times the median of
all leftovers (a normal distribution's standard deviation). Training makes single sites grow in a
few directions, which shows in the Frobenius norm; a scale that is wrong moves all singular values
alike, and with them their sum. So a site is an outlier only where norm and nuclear norm agree.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from plait.evaluation.inspection.base import BaseWeights
from plait.evaluation.inspection.report import AdapterReport, Finding, SiteReport

SPREADS = 4.0
"""A size is an outlier this many robust standard deviations above what is expected."""
FACTOR = 1.55
"""And by at least this factor: less is within what training does."""
EXPLODED = 4.0
"""The factor over its kind beyond which a whole layer may be wrong, not one site."""
ANYWHERE = 1.2
"""And by this factor over the module's sites in all layers, whatever its own layer's level."""
NARROWEST = 0.07
"""The least spread of log sizes that is believed: trained adapters have 0.02 to 0.08."""
FEWEST = 6

Array = np.ndarray[Any, np.dtype[Any]]


def check_adapter(report: AdapterReport) -> list[Finding]:
    """What one adapter's own numbers show."""
    return [*_not_finite(report), *_zero(report), *_dead(report), *outliers(report.sites)]


def check_base(report: AdapterReport, base: BaseWeights) -> list[Finding]:
    """Whether this is the base that the adapter was made for, and what it does to its weights."""
    found = [*_fingerprint(report, base), *_places(report, base)]
    heavy = [s for s in report.sites if (s.relative_norm or 0) > 1]
    if heavy:
        most = max(heavy, key=lambda s: s.relative_norm or 0)
        text = (
            f"the change outweighs the weight at {_some(heavy)}: up to {most.relative_norm:.1f} "
            "times its norm"
        )
        found.append(Finding("outweighs", text, _paths(heavy)))
    return found


def _not_finite(report: AdapterReport) -> list[Finding]:
    damaged = [s for s in report.sites if s.not_finite]
    if not damaged and not report.not_finite:
        return []
    count = sum(report.not_finite.values())
    where = ", ".join(f"{n} ({c})" for n, c in list(report.not_finite.items())[:3])
    more = len(report.not_finite) - 3
    text = f"{count} values are NaN or infinite, in {where}"
    if not report.not_finite:
        text = f"the change overflows at {_some(damaged)}"
    return [
        Finding("not-finite", text + (f" and {more} more" if more > 0 else ""), _paths(damaged))
    ]


def _zero(report: AdapterReport) -> list[Finding]:
    zero = [s for s in report.sites if s.is_zero and s.rank != 0]
    measured = [s for s in report.sites if s.norm is not None]
    if zero and len(zero) == len(measured):
        text = "every change is zero: the adapter does nothing (was it trained?)"
        return [Finding("zero", text, _paths(zero))]
    return [Finding("zero", f"the change is zero at {_some(zero)}", _paths(zero))] if zero else []


def _dead(report: AdapterReport) -> list[Finding]:
    dead = [s for s in report.sites if s.dead_components and not s.is_zero]
    if not dead:
        return []
    count = sum(s.dead_components for s in dead)
    return [
        Finding("dead-ranks", f"{count} rank components do nothing, at {_some(dead)}", _paths(dead))
    ]


# -- sizes ----------------------------------------------------------------------------------------


def outliers(sites: Sequence[SiteReport]) -> list[Finding]:
    """Sites that are far larger than the others lead one to expect."""
    known = [s for s in sites if s.norm and s.nuclear_norm and s.layer is not None]
    if len(known) < FEWEST or len({s.layer for s in known}) < 3:
        return []
    grid = _Grid(known)
    held = all(s.reach for s in known)
    norms = grid.fill(lambda s: math.log(s.norm or 1) - _usual(s, 0.5, held))
    sums = grid.fill(lambda s: math.log(s.nuclear_norm or 1) - _usual(s, 1.0, held))
    left = np.fmin(*(_excess(_polished(v)) for v in (norms, sums)))
    kind = np.fmin(*(v - _median(v, 0) for v in (norms, sums)))
    # Small layers have sites that are merely no smaller than elsewhere.
    alone = (left >= 0) & (kind >= math.log(ANYWHERE))
    layer = _excess(kind) >= math.log(EXPLODED / FACTOR)
    bad = [(grid.sites[i, j], norms, i, j) for i, j in np.argwhere(alone | layer)]
    return [_outlier(site, v, i, j, known) for site, v, i, j in bad]


def _outlier(
    site: SiteReport, values: Array, i: int, j: int, known: Sequence[SiteReport]
) -> Finding:
    others = np.delete(values[:, j], i)
    factor = math.exp(values[i, j] - float(np.nanmedian(others)))
    text = (
        f"the change at {site.path} is {factor:.1f} times as large as other layers' {site.module}"
    )
    scalings = [s.scaling for s in known if s.scaling and s is not site]
    usual = max(set(scalings), key=scalings.count, default=None)
    if usual and site.scaling and site.scaling != usual:
        text += f" (its scaling is {site.scaling:g}, elsewhere {usual:g}: is its alpha right?)"
    return Finding("outlier", text, (site.path,))


class _Grid:
    """Sites as a matrix, layers x modules; [i, j] is None where there is no site."""

    def __init__(self, sites: Sequence[SiteReport]) -> None:
        layers = sorted({s.layer for s in sites if s.layer is not None})
        columns = list(dict.fromkeys((s.module, s.shape) for s in sites))
        self.sites = np.full((len(layers), len(columns)), None, dtype=object)
        for site in sites:
            assert site.layer is not None
            self.sites[layers.index(site.layer), columns.index((site.module, site.shape))] = site

    def fill(self, value: Any) -> Array:
        numbers = [[np.nan if s is None else value(s) for s in row] for row in self.sites]
        return np.array(numbers, dtype=np.float64)


def _usual(site: SiteReport, power: float, held: bool) -> float:
    """Log of the size to measure by: ranks differ from site to site, and where the start of the
    factors comes from W, so do their steps' effects."""
    if site.rank is None:
        components = max(1.0, site.effective_rank or 1.0)
    else:
        components = max(1.0, site.rank)
    return power * math.log(components) + (math.log(site.reach or 1) if held else 0.0)


def _polished(values: Array) -> Array:
    """What is left when every module's and every layer's own level is taken off (median polish);
    with under three modules a layer's level is that of a line and of its neighbours."""
    left = values - _median(values, 0)
    if values.shape[1] < 3:
        left = left - _trend(left)
        return left - _neighbours(left)
    for _ in range(10):
        left = left - _median(left, 1)
        left = left - _median(left, 0)
    return left


def _trend(left: Array) -> Array:
    """Each module's line over the layers, its slope the median of those between any two."""
    layers = np.arange(len(left), dtype=np.float64)[:, None]
    one, other = np.triu_indices(len(left), 1)
    slope = _median((left[other] - left[one]) / (layers[other] - layers[one]), 0)
    line = slope * layers
    return line + _median(left - line, 0)


def _neighbours(left: Array) -> Array:
    levels = np.zeros_like(left)
    for i in range(len(left)):
        low = min(max(0, i - 2), max(0, len(left) - 5))
        around = [k for k in range(low, min(len(left), low + 5)) if k != i]
        levels[i] = _median(left[around], 0)[0]
    return levels


def _excess(left: Array) -> Array:
    """How far log sizes lie above the bound that makes an outlier; -inf where there is no site.

    Levels of layers and modules were fitted to these same sizes, so that what is left is narrower
    than what scattered: in a small network by a third. (Under three modules, a layer's level is
    its neighbours'.)
    """
    count, (layers, modules) = int(np.isfinite(left).sum()), left.shape
    fitted = layers + modules - 1 if modules >= 3 else modules
    wider = math.sqrt(count / max(1, count - fitted))
    spread = max(NARROWEST, 1.4826 * wider * float(np.nanmedian(np.abs(left))))
    bound = max(math.log(FACTOR), SPREADS * spread)
    return np.where(np.isnan(left), -np.inf, left - bound)


def _median(values: Array, axis: int) -> Array:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a layer or module without any site
        return np.nan_to_num(np.nanmedian(values, axis=axis, keepdims=True))


# -- the base -------------------------------------------------------------------------------------


def _fingerprint(report: AdapterReport, base: BaseWeights) -> list[Finding]:
    mine = report.fingerprint
    if mine is None or base.fingerprint is None or mine == base.fingerprint:
        return []
    named = report.info.get("base")
    text = (
        f"made for another base{f' ({named})' if named else ''}: fingerprint {mine[:8]}, but "
        f"{base.label} has {base.fingerprint[:8]}"
    )
    return [Finding("wrong-base", text)]


def _places(report: AdapterReport, base: BaseWeights) -> list[Finding]:
    missing = [s for s in report.sites if not base.holds(s.path)]
    if missing:
        text = f"{base.label} has no {_some(missing)}"
        return [Finding("wrong-base", text, _paths(missing))]
    shapes = {s.path: base.shape(s.path) for s in report.sites if s.kind != "module"}
    other = [s for s in report.sites if shapes.get(s.path) not in (None, tuple(s.shape))]
    if not other:
        return []
    first = other[0]
    text = (
        f"{len(other)} sites have another shape in {base.label}: {first.path} is "
        f"{_shape(first.shape)} in the adapter and {_shape(shapes[first.path] or ())} there"
    )
    return [Finding("wrong-base", text, _paths(other))]


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


# -- siblings -------------------------------------------------------------------------------------


def check_siblings(reports: Sequence[AdapterReport]) -> list[list[Finding]]:
    """For each of several adapters, what sets it apart from the others."""
    found: list[list[Finding]] = [[] for _ in reports]
    for i, text in _other_bases(reports):
        found[i].append(Finding("wrong-base", text))
    for i, text in _other_scales(reports):
        found[i].append(Finding("scale", text))
    return found


def _other_bases(reports: Sequence[AdapterReport]) -> list[tuple[int, str]]:
    marks = [r.fingerprint for r in reports]
    known = [m for m in marks if m is not None]
    if len(set(known)) < 2:
        return []
    usual = max(set(known), key=known.count)
    tied = known.count(usual) * 2 <= len(known)
    return [
        (i, f"made for another base than {'the others' if not tied else 'some others'} here")
        for i, mark in enumerate(marks)
        if mark is not None and (tied or mark != usual)
    ]


def _other_scales(reports: Sequence[AdapterReport]) -> list[tuple[int, str]]:
    """Adapters whose every site is larger than in the siblings, by much the same factor.

    Beside one sibling alone nothing says which of the two is right, nor how far two sound adapters
    may differ, so there the stated scalings must differ too, and by the factor of the norms.
    """
    found = []
    for i, mine in enumerate(reports):
        others = [r for r in reports if r is not mine and r.method == mine.method]
        ratios = [_ratio(mine, other) for other in others]
        known = [(o, r) for o, r in zip(others, ratios, strict=True) if r is not None]
        if not known:
            continue
        factor, stated = math.exp(float(np.median([r for _, r in known]))), _stated(mine)
        usual = float(np.median([_stated(o) for o, _ in known]))
        misstated = stated > 1.3 * usual > 0 and abs(math.log(factor * usual / stated)) < 0.3
        if not (misstated or _apart([r for _, r in known], reports, mine)):
            continue
        why = f"its scaling is {stated:g}, theirs {usual:g}: is its alpha right?"
        if not stated > 1.3 * usual > 0:
            why = "is its scaling, or its factors', right?"
        found.append((i, f"every change is {factor:.1f} times as large as its siblings'; {why}"))
    return found


def _apart(ratios: list[float], reports: Sequence[AdapterReport], mine: AdapterReport) -> bool:
    """Larger than each of at least two siblings, and by far more than they differ themselves."""
    if len(ratios) < 2:
        return False
    siblings = [r for r in reports if r is not mine and r.method == mine.method]
    among = [_ratio(a, b) for k, a in enumerate(siblings) for b in siblings[k + 1 :]]
    widest = max((abs(r) for r in among if r is not None), default=math.inf)
    return min(ratios) >= max(math.log(FACTOR), 3 * widest)


def _ratio(one: AdapterReport, other: AdapterReport) -> float | None:
    """The median over shared sites of log(norm / norm), where nine in ten go the same way."""
    norms = {s.path: s.norm for s in other.sites if s.norm}
    logs = [math.log(s.norm / norms[s.path]) for s in one.sites if s.norm and s.path in norms]
    if len(logs) < FEWEST:
        return None
    middle = float(np.median(logs))
    same = sum(math.copysign(1, value) == math.copysign(1, middle) for value in logs)
    return middle if same >= 0.9 * len(logs) else 0.0


def _stated(report: AdapterReport) -> float:
    scalings = [s.scaling for s in report.sites if s.scaling]
    return float(np.median(scalings)) if scalings else 0.0


def _paths(sites: Sequence[SiteReport]) -> tuple[str, ...]:
    return tuple(s.path for s in sites)


def _some(sites: Sequence[SiteReport]) -> str:
    shown = ", ".join(s.path for s in sites[:3])
    return shown + (f" and {len(sites) - 3} more sites" if len(sites) > 3 else "")
