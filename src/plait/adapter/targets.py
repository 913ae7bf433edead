"""`find_sites`: which places of a model a pattern touches.

Accepted targets: "all-linear", "all-conv", "embeddings", "experts", "blocks", "ffn"; a list of
names (exact path, or its ending after a dot); a regular expression that matches the whole path; or
a callable
`(path, module) -> bool`. Every name or pattern that matches nothing is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, cast

from torch import nn

from plait.adapter.site import Site, make_module_site, make_parameter_site, make_site
from plait.errors import PlaitError, nearest

Targets = str | Sequence[str] | Callable[[str, nn.Module], bool]

ADAPTER_CHILD = "plait_deltas"
SHARED_CHILD = "plait_shared"
_BLOCK_INDEX = re.compile(r"\.(?:layers|layer|h|blocks|block)\.(\d+)(?:\.|$)")


def base_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """The model's own modules, without anything Plait added."""
    hidden: set[str] = set()
    for path, module in model.named_modules():
        last = path.rpartition(".")[2]
        parent_hidden = path.rpartition(".")[0] in hidden
        if parent_hidden or last in (ADAPTER_CHILD, SHARED_CHILD):
            hidden.add(path)
            continue
        yield path, module


def find_sites(
    model: nn.Module,
    targets: Targets = "all-linear",
    *,
    exclude: Targets | None = None,
    layers: int | Iterable[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    kinds: Collection[str] | None = None,
) -> list[Site]:
    """The sites that `targets` touches, in the model's order.

    `exclude` takes the same forms and is subtracted; `layers` keeps only blocks of these indices
    (found in the path after `layers.`, `h.`, `block(s).`, or after `layers_pattern`); `kinds` is
    what the method can act on. Raises PlaitError for a pattern that matches nothing, or that
    touches a module of a kind the method does not know.
    """
    kinds = kinds or None  # a method without a delta of its own says so better than a kind would
    modules = dict(base_modules(model))
    sites = _select(model, modules, targets, kinds, what="target")
    if exclude is not None:
        out = {s.path for s in _select(model, modules, exclude, None, what="exclude")}
        sites = [s for s in sites if s.path not in out]
    if layers is not None:
        sites = _in_layers(sites, layers, layers_pattern)
    if not sites:
        raise PlaitError("no site is left after `exclude` and `layers`; widen the targets.")
    return sites


def _select(
    model: nn.Module,
    modules: dict[str, nn.Module],
    targets: Targets,
    kinds: Collection[str] | None,
    what: str,
) -> list[Site]:
    if isinstance(targets, str) and targets in KEYWORDS:
        sites = KEYWORDS[targets](model, modules)
        if not sites:
            raise PlaitError(f"{what} {targets!r} matches nothing in {type(model).__name__}.")
        for site in sites:
            if kinds is not None and site.kind not in kinds:
                raise _wrong_kind(site.path, modules, kinds)
        return sites
    if callable(targets):
        paths = [p for p, m in modules.items() if p and targets(p, m)]
        if not paths:
            raise PlaitError(f"the {what} function picked no module of {type(model).__name__}.")
        explicit = False
    else:
        paths, explicit = _match(model, modules, targets, what)
    return _make_sites(model, modules, paths, kinds, strict=explicit or what == "target")


def _match(
    model: nn.Module, modules: dict[str, nn.Module], targets: str | Sequence[str], what: str
) -> tuple[list[str], bool]:
    """Paths matched by names or one regular expression, and whether they were named one by one."""
    everything = {p: None for p in modules if p}
    everything |= {p: None for p, _ in _own_parameters(modules)}
    if isinstance(targets, str) and not re.fullmatch(r"[\w.]+", targets):
        try:
            pattern = re.compile(targets)
        except re.error as e:
            raise PlaitError(f"{what} {targets!r} is not a regular expression: {e}.") from None
        paths = [p for p in modules if p and pattern.fullmatch(p)]
        paths = paths or [p for p in everything if pattern.fullmatch(p)]
        if not paths:
            raise PlaitError(
                f"{what} pattern {targets!r} matches no module (it must match the whole path, "
                f"for example {_example(modules)!r})."
            )
        return paths, False
    names = [targets] if isinstance(targets, str) else list(targets)
    if not names:
        raise PlaitError(f"the list of {what}s is empty; name at least one module.")
    keywords = [n for n in names if n in KEYWORDS]
    chosen = {s.path for n in keywords for s in KEYWORDS[n](model, modules)}
    for name in names:
        if name in keywords:
            continue
        hits = [p for p in everything if p == name or p.endswith("." + name)]
        if not hits:
            raise _no_match(name, everything, what)
        chosen.update(hits)
    return [p for p in everything if p in chosen], True


def _no_match(name: str, paths: Iterable[str], what: str) -> PlaitError:
    endings = {p.rpartition(".")[2] for p in paths if not p.rpartition(".")[2].isdigit()}
    guess = nearest(name.rpartition(".")[2], endings) if "." not in name else nearest(name, paths)
    shown = ", ".join(sorted(endings)[:12])
    hint = f"did you mean {guess!r}?" if guess else f"modules end in: {shown}."
    return PlaitError(f"{what} {name!r} matches no module; {hint}")


def _example(modules: dict[str, nn.Module]) -> str:
    return next((p for p, m in modules.items() if isinstance(m, nn.Linear)), "model.layers.0")


def _make_sites(
    model: nn.Module,
    modules: dict[str, nn.Module],
    paths: Iterable[str],
    kinds: Collection[str] | None,
    strict: bool,
) -> list[Site]:
    sites: list[Site] = []
    for path in paths:
        site = _site_at(model, modules, path, kinds)
        if site is not None and (kinds is None or site.kind in kinds):
            sites.append(site)
        elif strict:
            raise _wrong_kind(path, modules, kinds)
    return sites


def _wrong_kind(
    path: str, modules: dict[str, nn.Module], kinds: Collection[str] | None
) -> PlaitError:
    module = modules.get(path)
    found = type(module).__name__ if module is not None else "a parameter"
    allowed = ", ".join(sorted(kinds or {"a weight"}))
    return PlaitError(
        f"target {path!r} is {found}, and this method acts on: {allowed}; "
        "name other targets or another method."
    )


def _site_at(
    model: nn.Module,
    modules: dict[str, nn.Module],
    path: str,
    kinds: Collection[str] | None,
) -> Site | None:
    if path not in modules:
        owner, _, name = path.rpartition(".")
        return make_parameter_site(path, modules[owner], name)
    module = modules[path]
    site = make_site(path, module)
    allowed = kinds or ()
    if "module" in allowed and (site is None or site.kind not in allowed):
        return make_module_site(path, module, block_width(model, module))
    return site


def _own_parameters(modules: dict[str, nn.Module]) -> Iterable[tuple[str, nn.Module]]:
    for path, module in modules.items():
        for name, value in module._parameters.items():
            if value is not None:
                yield (f"{path}.{name}" if path else name), module


def block_width(model: nn.Module, block: nn.Module) -> int:
    """The width of a block's output: the model's hidden size, or the block's own last
    norm/linear."""
    config = getattr(model, "config", None)
    for name in ("hidden_size", "n_embd", "d_model", "dim"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    widths = [m.out_features for m in block.modules() if isinstance(m, nn.Linear)]
    if not widths:
        raise PlaitError(f"cannot tell the width of {type(block).__name__}'s output.")
    return widths[-1]


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The transformer blocks: the children of the longest ModuleList of one class."""
    best: list[tuple[str, nn.Module]] = []
    for path, module in base_modules(model):
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
            continue
        if len({type(c) for c in module}) != 1 or not any(True for _ in module[0].children()):
            continue
        if len(module) > len(best):
            best = [(f"{path}.{i}" if path else str(i), child) for i, child in enumerate(module)]
    return best


def block_index(path: str, pattern: str | Sequence[str] | None = None) -> int | None:
    """The index of the block that `path` lies in, or None outside the blocks."""
    if pattern is None:
        found = _BLOCK_INDEX.search("." + path)
    else:
        names = [pattern] if isinstance(pattern, str) else list(pattern)
        found = re.search(rf"\.(?:{'|'.join(map(re.escape, names))})\.(\d+)(?:\.|$)", "." + path)
    return int(found.group(1)) if found else None


def _in_layers(
    sites: list[Site], layers: int | Iterable[int], pattern: str | Sequence[str] | None
) -> list[Site]:
    wanted = {layers} if isinstance(layers, int) else set(layers)
    index = {s.path: block_index(s.path, pattern) for s in sites}
    present = {i for i in index.values() if i is not None}
    if missing := sorted(wanted - present):
        top = max(present, default=None)
        raise PlaitError(f"layers {missing} match no site; the sites lie in layers 0 to {top}.")
    return [s for s in sites if index[s.path] in wanted]


def _output_heads(model: nn.Module) -> set[int]:
    heads: set[int] = set()
    if hasattr(model, "get_output_embeddings"):
        try:
            head = cast(Any, model).get_output_embeddings()
        except (NotImplementedError, AttributeError):
            head = None
        if head is not None:
            heads.add(id(head))
    if "ForSequenceClassification" in type(model).__name__:
        heads |= {id(getattr(model, n)) for n in ("score", "classifier") if hasattr(model, n)}
    return heads


def _all_linear(model: nn.Module, modules: dict[str, nn.Module]) -> list[Site]:
    heads = _output_heads(model)
    made = (make_site(p, m) for p, m in modules.items() if id(m) not in heads)
    return [s for s in made if s is not None and s.kind == "linear"]


def _of_kind(kind: str) -> Callable[[nn.Module, dict[str, nn.Module]], list[Site]]:
    def select(model: nn.Module, modules: dict[str, nn.Module]) -> list[Site]:
        made = (make_site(p, m) for p, m in modules.items())
        return [s for s in made if s is not None and s.kind == kind]

    return select


def _experts(model: nn.Module, modules: dict[str, nn.Module]) -> list[Site]:
    named = _own_parameters(modules)
    packed = [(p, m) for p, m in named if _parameter(m, p).dim() == 3 and "expert" in p.lower()]
    return [make_parameter_site(p, m, p.rpartition(".")[2]) for p, m in packed]


def _parameter(module: nn.Module, path: str) -> Any:
    return module._parameters[path.rpartition(".")[2]]


def _blocks(model: nn.Module, modules: dict[str, nn.Module]) -> list[Site]:
    return [make_module_site(p, m, block_width(model, m)) for p, m in find_blocks(model)]


def is_gated_ffn(module: nn.Module) -> bool:
    """A feed-forward block in the Llama form: gate, up, down and an activation."""
    return all(hasattr(module, n) for n in ("gate_proj", "up_proj", "down_proj", "act_fn"))


def _ffns(model: nn.Module, modules: dict[str, nn.Module]) -> list[Site]:
    found = [(p, m) for p, m in modules.items() if is_gated_ffn(m)]
    return [make_module_site(p, m, cast(Any, m).down_proj.out_features) for p, m in found]


KEYWORDS: dict[str, Callable[[nn.Module, dict[str, nn.Module]], list[Site]]] = {
    "all-linear": _all_linear,
    "all-conv": _of_kind("conv"),
    "embeddings": _of_kind("embedding"),
    "experts": _experts,
    "blocks": _blocks,
    "ffn": _ffns,
}
