"""`Bank`: many adapters of one base behind one basis; each comes back when it is asked for.

Averaging adapters loses what each of them knew. A bank keeps p basis vectors for every position
and p numbers for every adapter there ("Towards Reversible Model Merging for Low-rank Weights"):

    position t (row t of B, column t of A):   X_t = [x_1 ... x_n]  [r, n], x_i what adapter i has
    X_t = U S V^T     basis W_t = U_p [r, p]     coefficients C_t = W_t^T X_t [p, n]
    x_i ~ W_t C_t[:, i]

No basis of that size leaves less squared error in the factors: exactly the singular values beyond
p. Factors are determined only up to B G, G^-1 A, and different gauges share nothing, so adapters
are first brought to one: balanced by SVD, then turned by the rotation that takes each pair nearest
to the first adapter's (Procrustes). Errors are reported for dW, as the factors' errors multiply.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.adapter import Adapter, Site
from plait.adapter.convert import lora_from
from plait.adapter.formats.atomic import json_writer, tensors_writer, write_folder
from plait.adapter.formats.tensors import read_json, read_tensors
from plait.adapter.site import layout, rebuild_site
from plait.compression.changes import AdapterChanges, Given, take_apart
from plait.errors import FormatError, PlaitError, unknown
from plait.linalg import LowRank

DESCRIPTION, TENSORS = "bank.json", "bank.safetensors"
FORMAT = "plait-bank"


@dataclass
class Shelf:
    """One site: bases [out + in, r, p] of the rows of B and columns of A, coefficients [n, ...]."""

    site: Site
    basis: Tensor
    coefficients: dict[str, Tensor]
    """{adapter: [out + in, p]}."""

    def low(self, name: str) -> LowRank:
        stacked = (self.basis.float() @ self.coefficients[name].float()[..., None]).squeeze(-1)
        B, A = stacked.split([self.site.shape[-2], self.site.shape[-1]])
        return LowRank(B, A.mT.contiguous())

    def project(self, low: LowRank) -> Tensor:
        """The coefficients of another pair, turned to where the first adapter lies."""
        first = _stacked(self.low(next(iter(self.coefficients))))
        frame = _one_gauge([first, _stacked(_padded(low, self.basis.shape[1]))])[1]
        return torch.einsum("trp,tr->tp", self.basis.float(), frame).to(self.basis.dtype)


@dataclass
class Bank:
    """Adapters by name; `errors` {adapter: {site: ||dW - dW'|| / ||dW||}} as measured."""

    shelves: dict[str, Shelf]
    errors: dict[str, dict[str, float]]
    size: int

    @property
    def names(self) -> list[str]:
        return list(self.errors)

    def num_parameters(self) -> int:
        """Numbers stored: p (r + n) for each position."""
        shelves = self.shelves.values()
        return sum(
            s.basis.numel() + sum(c.numel() for c in s.coefficients.values()) for s in shelves
        )

    def adapter(self, name: str) -> Adapter:
        """One adapter as a plain LoRA (scaling 1, attached to nothing), ready to be activated."""
        if name not in self.errors:
            raise unknown("adapter", name, self.names, where="the bank")
        lows = {p: s.low(name) for p, s in self.shelves.items() if name in s.coefficients}
        sites = [self.shelves[path].site for path in lows]
        return lora_from(name, sites, lows, {}, info={"bank": {"errors": self.errors[name]}})

    @torch.no_grad()
    def add(self, adapter: Given) -> dict[str, float]:
        """One more adapter, as near as the basis comes; the others stay as they are.

        Returns its error at each site. Raises PlaitError for a site or a rank beyond the bank's.
        """
        part = take_apart(adapter)
        _check([part])
        if part.name in self.errors:
            raise PlaitError(f"the bank already holds an adapter named {part.name!r}.")
        for path, low in part.lows.items():
            shelf = self.shelves.get(path)
            if shelf is None or low.shape != shelf.site.shape or low.rank > shelf.basis.shape[1]:
                raise PlaitError(
                    f"the bank has no basis for {path!r} of {part.name!r}; make a new one."
                )
        for path, low in part.lows.items():
            self.shelves[path].coefficients[part.name] = self.shelves[path].project(low)
        self._measure(part)
        return self.errors[part.name]

    def _measure(self, part: AdapterChanges) -> None:
        self.errors[part.name] = {}
        for path, low in part.lows.items():
            gap = self.shelves[path].low(part.name) - low.to(dtype=torch.float32)
            whole = float(low.norm())
            self.errors[part.name][path] = float(gap.norm()) / whole if whole else 0.0

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the folder atomically."""
        tensors: dict[str, Tensor] = {}
        for where, shelf in self.shelves.items():
            tensors[f"{where}:basis"] = shelf.basis
            tensors |= {f"{where}:of:{n}": c for n, c in shelf.coefficients.items()}
        sites = [
            {"path": p, "layout": layout(s.site), "shape": list(s.site.shape)}
            | ({"details": s.site.details} if s.site.details else {})
            for p, s in self.shelves.items()
        ]
        described = {"format": FORMAT, "version": 1, "size": self.size, "errors": self.errors}
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
        if described.get("format") != FORMAT or described.get("version") != 1:
            raise FormatError(f"{file}: no bank of adapters that this Plait reads.")
        tensors, _ = read_tensors(Path(path) / TENSORS)
        try:
            errors = {str(n): dict(e) for n, e in described["errors"].items()}
            shelves = {s["path"]: _read(s, errors, tensors) for s in described["sites"]}
            return cls(shelves, errors, int(described["size"]))
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as e:
            raise FormatError(f"{file}: {' '.join(str(e).split())[:200]}") from e


def _read(record: Any, errors: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Shelf:
    path, shape = record["path"], tuple(record["shape"])
    details = {k: tuple(v) for k, v in record.get("details", {}).items()}
    basis = tensors[f"{path}:basis"]
    found = {n: tensors[f"{path}:of:{n}"] for n in errors if f"{path}:of:{n}" in tensors}
    fits = basis.dim() == 3 and len(basis) == sum(shape)
    if not fits or any(c.shape != (len(basis), basis.shape[2]) for c in found.values()):
        raise FormatError(f"the basis or the coefficients at {path!r} have another shape.")
    return Shelf(rebuild_site(path, record["layout"], shape, details), basis, found)


@torch.no_grad()
def make_bank(
    adapters: Sequence[Given], size: int = 2, *, dtype: torch.dtype = torch.float32
) -> Bank:
    """A bank of adapters of one base, of `size` basis vectors a position (p).

    Args:
        adapters: of any methods that are linear in their input and change no biases; `Adapter`s or
            paths, with different names. Ranks may differ (the smaller are padded).
        size: p, from 1; from min(rank, number of adapters) on every one comes back exactly.
        dtype: of what is stored; half precision halves the file.
    """
    parts = [take_apart(a) for a in adapters]
    names = [p.name for p in parts]
    if not parts or len(set(names)) < len(names) or size < 1:
        raise PlaitError(
            "give one adapter or more, each with a name of its own, and a size from 1."
        )
    _check(parts)
    paths = dict.fromkeys(path for part in parts for path in part.lows)
    shelves = {path: _shelve(path, parts, size, dtype) for path in paths}
    bank = Bank(shelves, {}, size)
    for part in parts:
        bank._measure(part)
    return bank


def _check(parts: Sequence[AdapterChanges]) -> None:
    for part in parts:
        if part.biases or part.extras:
            raise PlaitError(
                f"adapter {part.name!r} changes more than matrices; a bank holds none."
            )


def _shelve(path: str, parts: Sequence[AdapterChanges], size: int, dtype: torch.dtype) -> Shelf:
    here = [part for part in parts if path in part.lows]
    site = here[0].sites[path]
    for part in here:
        if part.sites[path].shape != site.shape or len(site.shape) != 2:
            raise PlaitError(
                f"site {path!r} is {list(part.sites[path].shape)} in adapter {part.name!r}; a bank "
                "holds matrices of one base."
            )
    rank = max(1, *(part.lows[path].rank for part in here))
    frames = _one_gauge([_stacked(_padded(part.lows[path], rank)) for part in here])
    X = torch.stack(frames, -1)  # [out + in, r, n]
    basis = torch.linalg.svd(X, full_matrices=False)[0][..., :size]
    coefficients = basis.mT @ X
    kept = {p.name: coefficients[..., i].to(dtype) for i, p in enumerate(here)}
    return Shelf(site, basis.to(dtype), kept)


def _padded(low: LowRank, rank: int) -> LowRank:
    """Balanced, in float32, with components of zeros up to `rank`."""
    even = low.to(dtype=torch.float32).balanced()
    missing = rank - even.rank
    B = torch.nn.functional.pad(even.B, (0, missing))
    return LowRank(B, torch.nn.functional.pad(even.A, (0, 0, 0, missing)))


def _stacked(low: LowRank) -> Tensor:
    """[out + in, r]: rows of B above columns of A; a rotation of the components turns both."""
    return torch.cat([low.B * low.scale, low.A.mT])


def _one_gauge(frames: list[Tensor]) -> list[Tensor]:
    """Each pair turned by the rotation of its components that takes it nearest to the first's."""
    turned = frames[:1]
    for frame in frames[1:]:
        U, _, Vh = torch.linalg.svd(frame.mT.double() @ turned[0].double())
        turned.append((frame.double() @ (U @ Vh)).float())
    return turned
