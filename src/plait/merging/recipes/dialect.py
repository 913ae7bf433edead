"""mergekit's merge methods in terms of Plait's: names, parameters, defaults and what they mean.

One entry a method. Each says what of the recipe it uses and gives a `Way` and weights whose result
is mergekit's, to rounding; draws at random agree in law only. Known departures: negative weights
under `normalize` (mergekit divides by the sum of the weights that agree, which can vanish; Plait by
the sum of their magnitudes), and entries as large as a trimming threshold, all of which stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from plait.errors import PlaitError
from plait.merging.recipes.parameters import Parameters
from plait.merging.work import Way

Base = Literal["unused", "first", "input", "optional", "required"]


@dataclass(frozen=True)
class Made:
    """How a tensor is merged: by what, with which weights, of which of the inputs (None: all).

    Without a way the (only) input is copied, times its weight.
    """

    way: Way | None
    weights: tuple[float, ...]
    kept: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Dialect:
    """A method of recipes.

    `base` says what base_model is: not used, the first of the inputs, an input where it has a
    weight, what changes are taken from where it is given, or that and required. `least` and `most`
    inputs besides such a base. `each` and `shared` are its parameters, of a model or of the merge.
    """

    base: Base
    make: Callable[[Parameters], Made]
    each: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    least: int = 1
    most: int | None = None


def way(method: str, **options: Any) -> Way:
    found = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    return Way(method, tuple(sorted(found.items())))


def normalized(p: Parameters, weights: Sequence[float]) -> tuple[float, ...]:
    total = sum(weights)
    if abs(total) < 1e-12:
        raise PlaitError(f"the weights add up to 0 at {p.name!r}; set normalize: false.")
    return tuple(w / total for w in weights)


def _linear(p: Parameters) -> Made:
    weights = p.numbers("weight")
    if p.flag("normalize", True):
        return Made(way("linear"), normalized(p, weights))
    return Made(way("linear"), tuple(weights))


def _slerp(p: Parameters) -> Made:
    t = p.number("t")
    return Made(way("slerp", norms="plain"), (1 - t, t))


def _nuslerp(p: Parameters) -> Made:
    along = "whole"
    if not p.flag("nuslerp_flatten", True) and not p.vector:
        along = "columns" if p.flag("nuslerp_row_wise", False) else "rows"
    return Made(way("nuslerp", along=along), tuple(p.numbers("weight")))


def _multislerp(p: Parameters) -> Made:
    p.number("eps", 1e-8)
    weights = p.numbers("weight")
    if p.flag("normalize_weights", True):
        return Made(way("karcher", iterations=0), normalized(p, weights))
    return Made(way("karcher", iterations=0), tuple(weights))


def _karcher(p: Parameters) -> Made:
    rounds, tolerance = int(p.number("max_iter", 10)), p.number("tol", 1e-5)
    chosen = way("karcher", iterations=rounds, tolerance=tolerance)
    return Made(chosen, (1 / p.count,) * p.count)


def _stock(p: Parameters) -> Made:
    along = "rows" if p.flag("filter_wise", False) else "whole"
    return Made(way("model-stock", along=along, clip=False), (1 / p.count,) * p.count)


def _sce(p: Parameters) -> Made:
    density = p.number("select_topk", 1.0)
    return Made(way("sce", density=density), (1 / p.count,) * p.count)


def _fusion(p: Parameters) -> Made:
    return Made(way("arcee-fusion"), (1.0,))


def _nearswap(p: Parameters) -> Made:
    return Made(way("nearswap", t=p.number("t")), (1.0,))


def _passthrough(p: Parameters) -> Made:
    return Made(None, (p.numbers("scale", 1.0)[0],))


def _arithmetic(
    method: str,
    *,
    elect: bool,
    normalize: bool = False,
    each: Mapping[str, float] | None = None,
    random: bool = False,
    fixed: Mapping[str, Any] | None = None,
) -> Dialect:
    """Sums of changes that are thinned out first: the family of task arithmetic.

    `elect`: signs are elected, as `fixed` (options of the method) says too where it has a choice.
    `each` holds the parameters that an input has besides its weight, with their defaults; an input
    of density 0 does not take part. `random` methods rescale what stays.
    """
    defaults = dict(each or {})

    def make(p: Parameters) -> Made:
        weights = p.numbers("weight")
        found = {name: p.numbers(name, default) for name, default in defaults.items()}
        kept = [i for i in range(p.count) if found.get("density", [1.0] * p.count)[i] > 0]
        options: dict[str, Any] = {"scale": p.number("lambda", 1.0)}
        for name, values in found.items():
            options[name] = [values[i] for i in kept]
        if "epsilon" in options:  # nothing is dropped at density 1, whatever epsilon says
            pairs = zip(options["density"], options["epsilon"], strict=True)
            options["epsilon"] = [0.0 if density >= 1 else epsilon for density, epsilon in pairs]
        options = {k: _one(v) for k, v in options.items()}
        if random:
            options["rescale"] = "l1" if p.flag("rescale", True) else "none"
        used = [weights[i] for i in kept]
        if p.flag("normalize", normalize):
            if not elect:
                used = list(normalized(p, used)) if used else []
        elif elect:
            options["reduce"] = "sum"
        return Made(way(method, **options, **dict(fixed or {})), tuple(used), tuple(kept))

    shared = {"normalize", "lambda", "int8_mask"} | ({"rescale"} if random else set())
    return Dialect("required", make, frozenset({"weight", *defaults}), frozenset(shared))


def _one(values: Any) -> Any:
    """The value that all inputs share, if they do."""
    if isinstance(values, list) and len(set(values)) == 1:
        return values[0]
    return values


DENSITY = {"density": 1.0}
CRUMBS = {"density": 1.0, "gamma": 0.01}
CHANCES = {"density": 1.0, "epsilon": 0.15}
ELECT: dict[str, Any] = {"fixed": {"elect": True}}
SUM: dict[str, Any] = {"fixed": {"elect": False}}
_WEIGHT = frozenset({"weight"})

DIALECT: dict[str, Dialect] = {
    "linear": Dialect("input", _linear, _WEIGHT, frozenset({"normalize"})),
    "slerp": Dialect("first", _slerp, shared=frozenset({"t"}), least=2, most=2),
    "nuslerp": Dialect(
        "optional",
        _nuslerp,
        _WEIGHT,
        frozenset({"nuslerp_flatten", "nuslerp_row_wise"}),
        least=2,
        most=2,
    ),
    "multislerp": Dialect(
        "optional", _multislerp, _WEIGHT, frozenset({"normalize_weights", "eps"}), least=2
    ),
    "karcher": Dialect("input", _karcher, shared=frozenset({"max_iter", "tol"}), least=2),
    "task_arithmetic": _arithmetic("linear", elect=False),
    "ties": _arithmetic("ties", elect=True, normalize=True, each=DENSITY),
    "dare_linear": _arithmetic("dare", elect=False, each=DENSITY, random=True),
    "breadcrumbs": _arithmetic("breadcrumbs", elect=False, each=CRUMBS),
    "dare_ties": _arithmetic("dare", elect=True, each=DENSITY, random=True, **ELECT),
    "breadcrumbs_ties": _arithmetic("breadcrumbs", elect=True, each=CRUMBS, **ELECT),
    "della": _arithmetic("della", elect=True, normalize=True, each=CHANCES, random=True),
    "della_linear": _arithmetic("della", elect=False, each=CHANCES, random=True, **SUM),
    "model_stock": Dialect("required", _stock, shared=frozenset({"filter_wise"}), least=2),
    "sce": Dialect("required", _sce, shared=frozenset({"select_topk", "int8_mask"})),
    "arcee_fusion": Dialect("required", _fusion, most=1),
    "nearswap": Dialect("required", _nearswap, shared=frozenset({"t"}), most=1),
    "passthrough": Dialect("unused", _passthrough, frozenset({"scale"}), most=1),
}
"""{merge_method: what it means}."""
