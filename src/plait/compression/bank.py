"""`Bank`: many adapters of one base behind shared bases; each comes back when it is asked for.

How they share is a shelf's matter: `make_bank` shares a basis at every position of the factors,
`joint_bank` one column and one row space a site. All else is here: what is stored in one file of
tensors, how one more adapter is put in, and what is lost of each, as measured on dW.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.adapter import Adapter, Site
from plait.adapter.convert import lora_from
from plait.adapter.formats.atomic import json_writer, tensors_writer, write_folder
from plait.adapter.formats.coded import Coded, decode_tensors
from plait.adapter.formats.tensors import read_json, read_tensors
from plait.adapter.site import layout, rebuild_site
from plait.compression.changes import AdapterChanges, Given, take_apart
from plait.compression.shelves import Shelf
from plait.errors import FormatError, PlaitError, unknown

DESCRIPTION, TENSORS = "bank.json", "bank.safetensors"
FORMAT, VERSION = "plait-bank", 2
ABOUT = ("base", "base_fingerprint", "task_type")
"""Facts of an adapter that come back with it."""


@dataclass
class Bank:
    """Adapters by name; `errors` {adapter: {site: ||dW - dW'|| / ||dW||}} as measured."""

    shelves: dict[str, Shelf]
    errors: dict[str, dict[str, float]]
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    """{adapter: what is known of its base}."""

    @classmethod
    def filled(cls, shelves: dict[str, Shelf], parts: Sequence[AdapterChanges]) -> Bank:
        """A bank whose shelves hold these adapters already."""
        bank = cls(shelves, {})
        for part in parts:
            bank._measure(part)
        return bank

    @property
    def names(self) -> list[str]:
        return list(self.errors)

    def num_parameters(self) -> int:
        """Numbers stored."""
        return sum(shelf.num_parameters() for shelf in self.shelves.values())

    def adapter(self, name: str) -> Adapter:
        """One adapter as a plain LoRA (scaling 1, attached to nothing), ready to be activated."""
        if name not in self.errors:
            raise unknown("adapter", name, self.names, where="the bank")
        lows = {p: s.low(name) for p, s in self.shelves.items() if name in s.names}
        sites = [self.shelves[path].site for path in lows]
        info = {**self.about.get(name, {}), "bank": {"errors": self.errors[name]}}
        return lora_from(name, sites, lows, {}, info=info)

    @torch.no_grad()
    def add(self, adapter: Given) -> dict[str, float]:
        """One more adapter, as near as the bases come; the others stay as they are.

        Returns its error at each site. Raises PlaitError for a site or a rank beyond the bank's.
        """
        (part,) = parts_of([adapter])
        if part.name in self.errors:
            raise PlaitError(f"the bank already holds an adapter named {part.name!r}.")
        for path, low in part.lows.items():
            if path not in self.shelves or not self.shelves[path].fits(low):
                raise PlaitError(
                    f"the bank has no basis for {path!r} of {part.name!r}; make a new one."
                )
        for path, low in part.lows.items():
            self.shelves[path].put(part.name, low)
        self._measure(part)
        return self.errors[part.name]

    def _measure(self, part: AdapterChanges) -> None:
        self.errors[part.name] = {}
        self.about[part.name] = {key: part.info[key] for key in ABOUT if key in part.info}
        for path, low in part.lows.items():
            gap = self.shelves[path].low(part.name) - low.to(dtype=torch.float32)
            whole = float(low.norm())
            self.errors[part.name][path] = float(gap.norm()) / whole if whole else 0.0

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the folder atomically."""
        tensors: dict[str, Tensor] = {}
        coded: list[Coded] = []
        for where, shelf in self.shelves.items():
            tensors |= {f"{where}:{n}": t for n, t in shelf.stored(coded).items()}
        for group in coded:
            tensors |= group.stored
        sites = [_described(path, shelf) for path, shelf in self.shelves.items()]
        kind = next(iter(self.shelves.values())).kind
        described = {"format": FORMAT, "version": VERSION, "kind": kind, "errors": self.errors}
        described |= {"about": self.about}
        described |= {"coded": [group.described() for group in coded]} if coded else {}
        files = {
            TENSORS: tensors_writer(tensors, {"format": "pt"}),
            DESCRIPTION: json_writer({**described, "sites": sites}),
        }
        return write_folder(Path(path), files)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Bank:
        """Read a folder; FormatError for anything missing or damaged."""
        file = Path(path) / DESCRIPTION
        described = read_json(file)
        if described.get("format") != FORMAT or described.get("version") not in (1, VERSION):
            raise FormatError(f"{file}: no bank of adapters that this Plait reads.")
        tensors, _ = read_tensors(Path(path) / TENSORS)
        try:
            tensors = decode_tensors(described.get("coded", []), tensors)
            kind = _kind(described.get("kind", "positions"))
            errors = {str(n): dict(e) for n, e in described["errors"].items()}
            here: dict[str, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                place, _, own = name.partition(":")
                here.setdefault(place, {})[own] = tensor
            shelves = {s["path"]: _read(kind, s, here[s["path"]]) for s in described["sites"]}
            about = {str(n): dict(facts) for n, facts in described.get("about", {}).items()}
            return cls(shelves, errors, about)
        except FormatError as e:
            raise FormatError(f"{file}: {e}") from None
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as e:
            raise FormatError(f"{file}: {' '.join(str(e).split())[:200]}") from e


def parts_of(adapters: Sequence[Given]) -> list[AdapterChanges]:
    """The changes of adapters that go into one bank; PlaitError where they cannot."""
    parts = [take_apart(a) for a in adapters]
    names = [part.name for part in parts]
    if not parts or len(set(names)) < len(names):
        raise PlaitError("give one adapter or more, each with a name of its own.")
    for part in parts:
        if part.biases or part.extras:
            raise PlaitError(
                f"adapter {part.name!r} changes more than matrices; a bank holds none."
            )
    return parts


def sites_of(parts: Sequence[AdapterChanges]) -> dict[str, Site]:
    """Every site of these adapters; PlaitError where two mean different matrices by it."""
    found: dict[str, Site] = {}
    for part in parts:
        for path in part.lows:
            site = found.setdefault(path, part.sites[path])
            if part.sites[path].shape != site.shape or len(site.shape) != 2:
                raise PlaitError(
                    f"site {path!r} is {list(part.sites[path].shape)} in adapter {part.name!r}; a "
                    "bank holds matrices of one base."
                )
    return found


def _described(path: str, shelf: Shelf) -> dict[str, Any]:
    site = shelf.site
    described = {"path": path, "layout": layout(site), "shape": list(site.shape)} | shelf.facts()
    return described | ({"details": site.details} if site.details else {})


def _kind(name: Any) -> type[Shelf]:
    from plait.compression.joint import JointShelf
    from plait.compression.positions import PositionShelf

    kinds: dict[Any, type[Shelf]] = {c.kind: c for c in (PositionShelf, JointShelf)}
    if name not in kinds:
        raise FormatError(f"adapters shared by {name!r} are none that this Plait reads.")
    return kinds[name]


def _read(kind: type[Shelf], record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Shelf:
    details = {k: tuple(v) for k, v in record.get("details", {}).items()}
    shape = tuple(record["shape"])
    site = rebuild_site(str(record["path"]), record["layout"], shape, details)
    return kind.read(site, record, tensors)
