"""Which entries of W a sparse change trains: how many, and those that a seed alone can name.

Options need `density`, `rank` (entries as a LoRA of that rank has, in place of `density`) and
`mask` ("struct" for whole rows and columns). Positions are sorted indices into the flattened W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plait.adapter import Site


def budget(site: Site, o: Any) -> int:
    """p, as asked for."""
    rows, columns = site.shape
    wanted = o.density * rows * columns if o.rank is None else o.rank * (rows + columns)
    return min(max(1, round(wanted)), rows * columns)


def entries(site: Site, o: Any) -> int:
    """How many entries train: p, or what whole rows and columns make of it."""
    if o.mask != "struct":
        return budget(site, o)
    rows, columns, diagonal = _structure(site, budget(site, o))
    overlap = rows * columns + rows + columns  # crossings, and the diagonal's entries on each line
    return rows * site.in_features + columns * site.out_features + diagonal - overlap


def _structure(site: Site, p: int) -> tuple[int, int, int]:
    """(whole rows, whole columns, diagonal entries) that fit into p entries."""
    diagonal = min(*site.shape, p)
    rows = (p - diagonal) // 2 // site.in_features
    columns = (p - diagonal - rows * site.in_features) // site.out_features
    rows = min(rows, diagonal // 2)  # every line crosses the diagonal at an entry of its own
    return rows, min(columns, diagonal - rows), diagonal


def structured(site: Site, p: int, g: torch.Generator) -> Tensor:
    """Flat positions of random rows and columns and of the diagonal."""
    rows, columns, diagonal = _structure(site, p)
    lines = torch.randperm(diagonal, generator=g)
    mask = torch.zeros(site.shape, dtype=torch.bool)
    mask.diagonal()[:diagonal] = True
    mask[lines[:rows]] = True
    mask[:, lines[rows : rows + columns]] = True
    return mask.flatten().nonzero().flatten()


def draw(total: int, count: int, g: torch.Generator) -> Tensor:
    """`count` distinct numbers below `total`, uniform and sorted, without shuffling them all."""
    if 2 * count > total:
        return torch.randperm(total, generator=g)[:count].sort().values
    found = torch.empty(0, dtype=torch.long)
    while len(found) < count:
        # Distinct draws are a uniform subset of their size, and so is a random part of them.
        more = torch.randint(total, (2 * (count - len(found)) + 16,), generator=g)
        found = torch.cat([found, more]).unique()
    return found[torch.randperm(len(found), generator=g)[:count]].sort().values
