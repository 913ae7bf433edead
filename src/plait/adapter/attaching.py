"""Attaching adapters to a model, and taking them off again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from plait.adapter import registry
from plait.adapter.activation import base_weights, refuse_fused, set_active
from plait.adapter.adapted import adapt_module, delta_key, deltas_of, is_adapted, release_module
from plait.adapter.adapter import Adapter
from plait.adapter.build import (
    Overrides,
    build_adapter,
    choose_deltas,
    make_options,
    options_by_site,
)
from plait.adapter.delta import Delta
from plait.adapter.method import Initializer, Method
from plait.adapter.pair import PairOptions
from plait.adapter.replacement import add_modules, find_modules
from plait.adapter.seeds import fresh_seed
from plait.adapter.site import Site, make_site
from plait.adapter.state import (
    ModelState,
    drop_state,
    find_state,
    get_state,
    make_state,
    shared_store,
)
from plait.adapter.targets import Targets, base_modules, find_sites
from plait.errors import PlaitError, nearest


def attach(
    model: nn.Module,
    method: str | Method = "lora",
    *,
    name: str = "default",
    targets: Targets | None = None,
    exclude: Targets | None = None,
    layers: int | Iterable[int] | None = None,
    overrides: Overrides | None = None,
    initializer: str | Initializer | None = None,
    data: Iterable[Any] | None = None,
    train_modules: Sequence[str] = (),
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    activate: bool = True,
    **options: Any,
) -> Adapter:
    """Attach a new adapter to any torch module and make it the active one.

    The model is not wrapped: its modules keep their names and classes, and its base parameters are
    frozen (detaching the last adapter lets them train again).

    Args:
        method: a name from `plait methods`, or a `Method`.
        name: the adapter's name on this model.
        targets, exclude, layers: which sites; see `plait.find_sites`. None takes the method's own.
        overrides: `{pattern: {option: value}}` for sites with other options.
        initializer: where the factors start (`"pissa"`, `LoraGA(gamma=16)`, ...); None takes the
            method's own.
        data: batches (dicts for `model(**batch)`) for initialisers that look at the data.
        train_modules: whole modules (paths or endings, `["score"]`) of which the adapter trains and
            saves its own copy; targets within them are left out.
        seed: of all random starts and frozen bases; None draws one from torch's generator.
        dtype: of the adapter; None is float32 (float64 beside a float64 base).
        activate: make it the only active adapter.
        **options: the method's options (`rank=16, alpha=32, dropout=0.05`).

    Raises:
        PlaitError: an unknown method, option or target (naming the nearest), a name already taken.
    """
    method = registry.get_method(method)
    chosen = make_options(method, options)
    sites = None
    if targets is not None or method.choose is None:
        goal = method.targets if targets is None else targets
        sites = find_sites(model, goal, exclude=exclude, layers=layers, kinds=method.kinds)
    check_free(model, name)
    pieces = choose_deltas(method, model, sites, chosen)
    whole = find_modules(model, train_modules) if train_modules else {}
    pieces = [(s, c) for s, c in pieces if not any(f"{s.path}.".startswith(f"{w}.") for w in whole)]
    start = registry.get_initializer(initializer or _own_initializer(method))
    with base_weights(model):
        found = _collect(start, model, pieces, data, getattr(chosen, "rank", 0))
        by_site = options_by_site([s for s, _ in pieces], chosen, overrides or {})
        if start is not None:
            pieces, by_site = _with_ranks(start, pieces, by_site, found)
        adapter = build_adapter(
            name,
            method,
            pieces,
            chosen,
            by_site=by_site,
            seed=fresh_seed() if seed is None else seed,
            dtype=dtype,
        )
        _write_starts(adapter, start, found)
        add_modules(adapter, model, whole)
        return install(model, adapter, activate=activate)


def _own_initializer(method: Method) -> Initializer | None:
    return None if method.initializer is None else method.initializer()


def _collect(
    start: Initializer | None,
    model: nn.Module,
    pieces: Sequence[tuple[Site, type[Delta]]],
    data: Iterable[Any] | None,
    rank: int,
) -> dict[str, Any]:
    if start is None:
        return {}
    if start.needs and data is None:
        raise PlaitError(
            f"initialiser {type(start).__name__} needs {', '.join(sorted(start.needs))}; "
            "pass data=<batches>, a list of dicts for model(**batch)."
        )
    return start.collect(model, [s for s, _ in pieces], data, rank)


def _with_ranks(
    start: Initializer, pieces: Any, by_site: dict[str, Any], found: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Apply the initialiser's choice of ranks; a rank of 0 leaves the site out."""
    sites = [s for s, _ in pieces]
    rank = getattr(next(iter(by_site.values())), "rank", 0)
    ranks = start.ranks(sites, found, rank)
    for path, r in ranks.items():
        old = by_site[path]
        if not isinstance(old, PairOptions):
            raise PlaitError(
                f"initialiser {type(start).__name__} chooses ranks, which {type(old).__name__} "
                "does not have; use it with a method such as lora."
            )
        # alpha follows the rank: the scaling stays as configured.
        root = (r / old.rank) ** (0.5 if old.rslora else 1.0)
        by_site[path] = dataclasses.replace(old, rank=r, alpha=old.scaling * _root(old) * root)
    return [(s, c) for s, c in pieces if ranks.get(s.path, 1) > 0], by_site


def _root(options: Any) -> float:
    return options.rank**0.5 if options.rslora else options.rank


def _write_starts(adapter: Adapter, start: Initializer | None, found: dict[str, Any]) -> None:
    with torch.no_grad():
        for path, delta in adapter.deltas.items():
            delta.reset()
            if start is not None:
                start.start(delta, found.get(path))


def check_free(model: nn.Module, name: str) -> None:
    """Raise when no adapter of this name can be attached to the model."""
    state = find_state(model)
    if state is None:
        if any(is_adapted(m) for m in model.modules()):
            raise PlaitError(
                f"parts of this {type(model).__name__} already carry adapters that were attached "
                "to another module; attach to that same module, or detach them first."
            )
        return
    if name in state.adapters:
        raise PlaitError(
            f"adapter {name!r} is already attached; choose another name=, or "
            f"plait.detach(model, {name!r})."
        )
    refuse_fused(state, "attach")


def install(
    model: nn.Module, adapter: Adapter, *, activate: bool = True, train: bool = True
) -> Adapter:
    """Put a built adapter's deltas on its sites (whose modules belong to `model`)."""
    state = make_state(model)
    if not state.adapters:
        _freeze_base(model, state)
    state.adapters[adapter.name] = adapter
    adapter.state = state
    shared_store(model).add_module(adapter.name, adapter.shared)
    for path, delta in adapter.deltas.items():
        kind = delta.site.kind
        owner = path.rpartition(".")[2] if kind == "parameter" else None
        store = adapt_module(delta.site.base, owner)
        store.add_module(delta_key(adapter.name, path, kind), delta)
        delta.context = state.context
        delta.train(delta.site.base.training)
    with torch.no_grad(), base_weights(model):
        for delta in adapter.deltas.values():
            delta.attached()
    adapter.requires_grad_(train)
    state.plans.clear()
    if activate:
        set_active(model, {adapter.name: 1.0})
    return adapter


def _freeze_base(model: nn.Module, state: ModelState) -> None:
    state.trained_base = [p for p in model.parameters() if p.requires_grad]
    for parameter in state.trained_base:
        parameter.requires_grad_(False)


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter (or all) off the model, which is then what it was, bit for bit.

    The Adapter object stays usable on its own: it can be saved, and its deltas still answer.
    """
    state = get_state(model)
    refuse_fused(state, "detach")
    for each in [name] if name is not None else list(state.adapters):
        _detach_one(state, state.adapter(each))
    if not state.adapters:
        drop_state(state.model)


def _detach_one(state: ModelState, adapter: Adapter) -> None:
    set_active(state.model, {n: w for n, w in state.active.items() if n != adapter.name})
    state.plans.clear()
    for path, delta in adapter.deltas.items():
        module = delta.site.base
        store = deltas_of(module)
        del store[delta_key(adapter.name, path, delta.site.kind)]
        if len(store) == 0:
            release_module(module)
        delta.site = delta.site.bare()
    del shared_store(state.model)._modules[adapter.name]
    del state.adapters[adapter.name]
    adapter.state = None


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters on a model, by name."""
    state = find_state(model)
    return {} if state is None else dict(state.adapters)


def bind(adapter: Adapter, model: nn.Module) -> Adapter:
    """Point a bare adapter's sites at the modules of `model`, by path."""
    modules = dict(base_modules(model))
    for path, delta in adapter.deltas.items():
        owner = path.rpartition(".")[0] if delta.site.kind == "parameter" else path
        if owner not in modules:
            guess = nearest(path, modules)
            hint = f"; the nearest is {guess!r}" if guess else ""
            raise PlaitError(
                f"adapter {adapter.name!r} has a site {path!r}, which this model lacks{hint}. "
                "Is it the right base model?"
            )
        _check_shape(delta, modules[owner])
        _move(delta, delta.site.device)
    for delta in adapter.deltas.values():
        _move(adapter.shared, delta.site.device)
        break
    return adapter


def _move(module: nn.Module, device: torch.device) -> None:
    tensors = [*module.parameters(), *module.buffers()]
    if any(t.device != device for t in tensors):  # Module.to() is slow even with nothing to do
        module.to(device)


def _check_shape(delta: Delta, module: nn.Module) -> None:
    site = delta.site
    made = None if site.kind in ("parameter", "module") else make_site(site.path, module)
    if made is not None and made.shape != site.shape:
        raise PlaitError(
            f"site {site.path!r} is {list(made.shape)} in this model, but the adapter was made for "
            f"{list(site.shape)}; is it the right base model?"
        )
    delta.site = type(made or site)(site.path, site.shape, module, site.details)
