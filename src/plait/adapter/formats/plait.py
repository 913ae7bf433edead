"""Plait's own folder: plait.json (what it is) and adapter.safetensors (what was trained).

    plait.json            method, options, seed, and per site: path, layout, shape, options that
                          differ; checksums of the tensors that the seed regenerates; which
                          tensors are stored as codes of a few bits (see `coded`); which sites
                          have the pair of another one (see `twins`)
    adapter.safetensors   trained and stored tensors, by "site path.name" and "shared:name"

Everything an adapter holds comes back bit for bit: ranks per site, shared pools, held-back starts,
router state, replaced modules.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import plait
from plait.adapter.adapter import Adapter
from plait.adapter.build import build_adapter, make_options
from plait.adapter.delta import Delta, Options
from plait.adapter.formats.atomic import json_writer, tensors_writer, write_folder
from plait.adapter.formats.coded import Coded, decode_tensors
from plait.adapter.formats.limits import limit_allocation
from plait.adapter.formats.tensors import check_names, read_json, read_tensors, warn_not_finite
from plait.adapter.formats.twins import find_twins, with_twins, without_twins
from plait.adapter.method import Method
from plait.adapter.registry import get_method
from plait.adapter.replacement import EXTRAS, is_extra
from plait.adapter.seeds import checksum
from plait.adapter.site import SITE_TYPES, Site, layout, rebuild_site
from plait.errors import FormatError, PlaitError

DESCRIPTION, TENSORS = "plait.json", "adapter.safetensors"
FORMAT, VERSION = "plait-adapter", 3
PLAIN, CODED, TWINS = 1, 2, 3
"""Versions by what a file needs of its reader: nothing new, codes, or shared pairs."""


def save_plait(adapter: Adapter, path: Path, coded: Sequence[Coded] = ()) -> Path:
    """Write the folder atomically; the tensors named in `coded` as their codes."""
    if (path / "adapter_config.json").exists():
        raise FormatError(f"{path} holds an adapter in PEFT's format; choose another folder.")
    tensors = adapter.state_dict()
    described = describe(adapter)
    if twins := {} if coded else find_twins(adapter.deltas, tensors):
        described |= {"version": TWINS, "same": twins}
        tensors = without_twins(tensors, twins)
    if coded:
        described["version"] = CODED
        described["coded"] = [group.described() for group in coded]
        as_codes = {name for group in coded for name in group.shapes}
        tensors = {n: t for n, t in tensors.items() if n not in as_codes}
        tensors |= {n: t for group in coded for n, t in group.stored.items()}
    check_names(path / TENSORS, tensors)
    files = {
        TENSORS: tensors_writer(tensors, {"format": "pt", "method": adapter.method.name}),
        DESCRIPTION: json_writer(described),
    }
    return write_folder(path, files)


def describe(adapter: Adapter) -> dict[str, Any]:
    """What plait.json holds."""
    options = _plain_options(adapter.options)
    dtype = next((d.dtype for d in adapter.deltas.values() if not is_extra(d)), torch.float32)
    sites = [_describe_site(d, adapter.method, options, dtype) for d in adapter.deltas.values()]
    sums = {n: [_dtype_name(t), checksum(t)] for n, t in adapter.seeded_tensors().items()}
    return {
        "format": FORMAT,
        "version": PLAIN,
        "plait": plait.__version__,
        "torch": torch.__version__,
        "name": adapter.name,
        "method": adapter.method.name,
        "options": options,
        "seed": adapter.seed,
        "dtype": str(dtype).removeprefix("torch."),
        "info": adapter.info,
        "sites": sites,
        "checksums": sums,
    }


def _describe_site(
    delta: Delta, method: Method, common: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    site = delta.site
    described: dict[str, Any] = {
        "path": site.path,
        "layout": layout(site),
        "shape": list(site.shape),
    }
    if site.details:
        described["details"] = site.details
    if not is_extra(delta):
        own = delta.described_options()
        if different := {k: v for k, v in own.items() if common.get(k) != v}:
            described["options"] = different
    if type(delta) is not method.delta:
        described["delta"] = type(delta).__name__
    if delta.dtype != dtype:
        described["dtype"] = str(delta.dtype).removeprefix("torch.")
    return described


def _plain_options(options: Any) -> dict[str, Any]:
    return dataclasses.asdict(options)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# -- reading ------------------------------------------------------------------------------------


def read_plait(path: Path, name: str | None = None) -> Adapter:
    """The adapter in the folder, attached to nothing.

    Raises FormatError, naming file and cause, when anything in it does not hold up.
    """
    file = path / DESCRIPTION
    described = read_json(file)
    if described.get("format") != FORMAT:
        raise FormatError(f"{file}: not a Plait adapter (format {described.get('format')!r}).")
    version = described.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise FormatError(
            f"{file}: written in version {version!r} of the format; this Plait reads up to "
            f"{VERSION}, so upgrade it."
        )
    tensors, _ = read_tensors(path / TENSORS)
    try:
        tensors = decode_tensors(described.get("coded", []), tensors)
        tensors = with_twins(tensors, described.get("same", {}))
        with limit_allocation(described, tensors, str(file)):
            adapter = _build(described, tensors, name)
        # Clones, because a product's last bit may depend on how its factors lie in memory.
        adapter.load_state_dict({k: t.clone() for k, t in tensors.items()}, assign=True)
        _check_seeded(adapter, described.get("checksums", {}), described.get("torch"))
    except FormatError as e:
        raise e if str(file) in str(e) else FormatError(f"{file}: {e}") from None
    except (PlaitError, TypeError, ValueError, LookupError, AttributeError, RuntimeError) as e:
        cause = f"lacks {e}" if type(e) is KeyError else " ".join(str(e).split())[:300]
        raise FormatError(f"{file}: {cause}") from e
    warn_not_finite(path / TENSORS, tensors)
    return adapter


def _build(described: dict[str, Any], tensors: dict[str, Tensor], name: str | None) -> Adapter:
    method = get_method(_typed(described["method"], str, "method"))
    options = make_options(method, _tuples(method, described["options"]))
    pieces, by_site, dtypes = [], {}, {}
    for record in _typed(described["sites"], list, "sites"):
        site = _read_site(record)
        cls = _delta_class(method, record.get("delta"))
        pieces.append((site, cls))
        own = _tuples(method, record.get("options", {}))
        by_site[site.path] = Options() if cls in EXTRAS.values() else _vary(options, method, own)
        dtypes[site.path] = record.get("dtype")
    if len(by_site) != len(pieces):
        raise FormatError("a site is listed twice.")
    adapter = build_adapter(
        name or _typed(described["name"], str, "name"),
        method,
        pieces,
        options,
        by_site=by_site,
        seed=_typed(described["seed"], int, "seed"),
        dtype=_dtype(described["dtype"]),
        info=_typed(described.get("info", {}), dict, "info"),
    )
    _make_room(adapter, tensors)
    for path, dtype in dtypes.items():
        if dtype is not None:
            adapter.deltas[path].to(_dtype(dtype)).dtype = _dtype(dtype)
    return adapter


def _read_site(record: Any) -> Site:
    record = _typed(record, dict, "sites")
    path, kind = _typed(record["path"], str, "path"), _typed(record["layout"], str, "layout")
    check_names(Path(DESCRIPTION), [path or "root"])
    if kind not in SITE_TYPES:
        raise FormatError(f"site {path!r} has the layout {kind!r}; known: {', '.join(SITE_TYPES)}.")
    shape = _typed(record["shape"], list, "shape")
    if not 1 <= len(shape) <= 8 or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise FormatError(f"site {path!r} has the shape {str(shape)[:80]}, which no weight has.")
    details = _deep_tuples(_typed(record.get("details", {}), dict, "details"))
    return rebuild_site(path, kind, tuple(shape), details)


def _delta_class(method: Method, name: str | None) -> type[Delta]:
    """A delta class by its name, looked up only where the method itself is defined."""
    if name is None:
        if method.delta is None:
            raise FormatError(f"method {method.name!r} does not say which delta its sites have.")
        return method.delta
    if name in EXTRAS:
        return EXTRAS[name]
    homes: list[Callable[..., Any] | type | None] = [method.choose, method.delta, method.options]
    for home in homes:
        found = getattr(sys.modules.get(getattr(home, "__module__", "")), str(name), None)
        if isinstance(found, type) and issubclass(found, Delta):
            return found
    raise FormatError(f"method {method.name!r} has no delta {name!r}.")


def _make_room(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Allocate what this file stores beyond the method's usual: held-back starts, and frozen
    tensors that usually come from the seed but here came from elsewhere."""
    for path, delta in adapter.deltas.items():
        for name in sorted(delta.optional | delta._non_persistent_buffers_set):
            stored = tensors.get(f"{path}.{name}")
            if stored is not None:
                delta.frozen(name, *stored.shape, dtype=stored.dtype)
    for name in sorted(adapter.shared._non_persistent_buffers_set):
        if f"shared:{name}" in tensors:
            adapter.shared.keep(name, tensors[f"shared:{name}"])


def _check_seeded(adapter: Adapter, sums: Any, version: Any) -> None:
    recorded = _typed(sums, dict, "checksums")
    for name, tensor in adapter.seeded_tensors().items():
        if name not in recorded:
            continue
        dtype, expected = recorded[name]
        tensor.data = tensor.data.to(_dtype(dtype))
        if checksum(tensor) != expected:
            raise FormatError(
                f"the frozen random tensor {name!r} comes out differently here than where the "
                f"adapter was saved; load it with torch {version} and export it with to_lora()."
            )
    missing = recorded.keys() - adapter.seeded_tensors().keys()
    if unknown := [n for n in missing if n.startswith("shared:")]:
        warnings.warn(f"adapter {adapter.name!r}: {unknown[0]!r} is not made here.", stacklevel=3)


def _vary(options: Any, method: Method, own: dict[str, Any]) -> Any:
    if not own:
        return options
    known = {f.name for f in dataclasses.fields(options)}
    if own.keys() - known:
        return make_options(method, own)  # names the unknown option
    return dataclasses.replace(options, **own)


def _tuples(method: Method, given: Any) -> dict[str, Any]:
    """JSON has no tuples: lists become tuples again where the option is declared as one."""
    types = {f.name: str(f.type) for f in dataclasses.fields(method.options)}
    given = _typed(given, dict, "options")
    return {
        k: tuple(v) if isinstance(v, list) and "list" not in types.get(k, "") else v
        for k, v in given.items()
    }


def _deep_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _deep_tuples(v) for k, v in value.items()}
    return tuple(_deep_tuples(v) for v in value) if isinstance(value, list) else value


def _dtype(name: Any) -> torch.dtype:
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise FormatError(f"{name!r} is not a dtype.")
    return found


def _typed(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise FormatError(f"{what!r} must be a {kind.__name__}, not {str(value)[:40]!r}.")
    return value
