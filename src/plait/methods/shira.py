"""SHiRA: train a sparse set of W's entries, whatever the rank of that change.

    x ──► W + s * scatter(indices, values) ──► y

dW is zero but at p fixed positions, whose values [p] start at 0: training starts at the base model.
`mask` says which positions: "rand" (uniform, regenerated from the seed), "struct" (whole rows and
columns and the diagonal, which makes dW full-rank; from the seed too), "wm" (the largest |W|),
"grad" and "snip" (the largest |g| and |W g| of calibration batches, through `MaskFromGradient`).
The product is a sparse one, beside any base, and backward samples g^T x at the p positions: no
copy of W and no dense dW exists. Devices without sparse products form dW instead.
Paper: Bhardwaj et al., 2024, arXiv 2406.13175. Parameters: p a site (density, or r (in + out)).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from plait.adapter import Delta, Initializer, Method, Options, PeftCodec, Site, per_site
from plait.adapter.formats.peft_codec import any_transposed
from plait.adapter.method import PeftSite
from plait.errors import FormatError, PlaitError
from plait.kernels._gate import plain_path
from plait.methods._sparse import Layout, has_sparse, make_layout, sparse_linear
from plait.statistics import gradient_pass

MASKS = ("rand", "struct", "wm", "grad", "snip")


@dataclass(frozen=True)
class ShiraOptions(Options):
    density: float = 0.01
    """Share of W's entries that train (paper: 0.01 to 0.02)."""
    rank: int | None = None
    """Train as many entries as LoRA of this rank, r (in + out), instead of `density`."""
    mask: Literal["rand", "struct", "wm", "grad", "snip"] = "rand"
    """Which entries; the paper prefers wm and snip for language models."""

    def __post_init__(self) -> None:
        if self.mask not in MASKS:
            raise PlaitError(f"mask must be one of {', '.join(MASKS)}, not {self.mask!r}.")
        if not 0 < self.density <= 1 or (self.rank is not None and self.rank < 1):
            raise PlaitError(
                f"density must lie in (0, 1] and rank be at least 1, not {self.density} and "
                f"{self.rank}."
            )


class ShiraDelta(Delta):
    kinds = frozenset({"linear", "conv"})
    options: ShiraOptions
    values: Tensor
    indices: Tensor  # sorted, into the flattened W

    def build(self) -> None:
        count = entries(self.site, self.options)
        self.parameter("values", count)
        kind = torch.int32 if math.prod(self.site.shape) < 2**31 else torch.int64
        if self.options.mask == "rand":
            total = math.prod(self.site.shape)
            self.seeded_value("indices", draw(total, count, self.generator("mask")).to(kind))
        elif self.options.mask == "struct":
            found = structured(self.site, budget(self.site, self.options), self.generator("mask"))
            self.seeded_value("indices", found.to(kind))
        else:
            self.frozen("indices", count, dtype=kind)
        self._layout: tuple[Any, Layout] | None = None

    def reset(self) -> None:
        if self.options.mask == "wm":
            self.choose(self.base_weight().abs())

    def choose(self, scores: Tensor) -> None:
        """Train the entries with the largest scores [out, in]."""
        top = scores.flatten().topk(len(self.values), sorted=False).indices
        self.indices.copy_(top.sort().values)

    def attached(self) -> None:
        if len(self.indices) > 1 and not self.indices[-1]:
            raise PlaitError(
                f"shira at {self.site.path!r}: mask {self.options.mask!r} comes from gradients; "
                "attach with initializer=MaskFromGradient() and data=<batches>."
            )

    def dense(self) -> Tensor:
        flat = self.values.new_zeros(math.prod(self.site.shape))
        return flat.index_copy(0, self.indices.long(), self.values).view(self.site.shape)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if self.site.kind == "conv" or plain_path(x, self.values) or not has_sparse(x.device):
            return super().forward(x, y)
        return sparse_linear(x, self.values, self.layout())

    def layout(self) -> Layout:
        """The positions by rows and by columns, made again when they were written or moved."""
        now = (self.indices.device, self.indices._version)
        if self._layout is None or self._layout[0] != now:
            self._layout = (now, make_layout(self.indices.long(), *self.site.shape))
        return self._layout[1]


# -- which entries -----------------------------------------------------------------------------


def budget(site: Site, o: ShiraOptions) -> int:
    """p, as asked for."""
    rows, columns = site.shape
    wanted = o.density * rows * columns if o.rank is None else o.rank * (rows + columns)
    return min(max(1, round(wanted)), rows * columns)


def entries(site: Site, o: ShiraOptions) -> int:
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


@dataclass
class MaskFromGradient(Initializer):
    """Choose the entries of `mask="grad"` (largest |g|) or `"snip"` (largest |W g|)."""

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})

    def collect(
        self, model: nn.Module, sites: Sequence[Site], data: Iterable[Any] | None, rank: int
    ) -> dict[str, Any]:
        return dict(gradient_pass(model, sites, data or ()))

    def start(self, delta: Delta, statistics: Tensor) -> None:
        if not isinstance(delta, ShiraDelta) or delta.options.mask not in ("grad", "snip"):
            raise PlaitError(
                f"MaskFromGradient at {delta.site.path!r} needs shira with mask='grad' or 'snip'."
            )
        scores = statistics.to(delta.device).abs()
        if delta.options.mask == "snip":
            scores = scores * delta.base_weight().abs()
        delta.choose(scores)


def _read_peft(delta: Delta, found: PeftSite) -> None:
    rows, columns = found.tensors["shira_indices"].long()
    flat = rows * delta.site.in_features + columns
    values = found.tensors["shira_weight"]
    if len(flat) != len(values) or len(flat) != len(delta.get_parameter("values")):
        raise FormatError(f"{found.path!r} has {len(values)} values at {len(flat)} positions.")
    kind = delta.get_buffer("indices").dtype
    delta.frozen("indices", len(flat), dtype=kind).copy_(flat.sort().values)
    delta.get_parameter("values").copy_(values[flat.argsort()])


def _write_peft(delta: Delta) -> dict[str, Tensor]:
    flat = delta.get_buffer("indices").long()
    columns = delta.site.in_features
    places = torch.stack([flat // columns, flat % columns]).int()
    return {"shira_weight": delta.get_parameter("values"), "shira_indices": places}


def _peft_config(deltas: Mapping[str, Delta]) -> dict[str, Any]:
    found = {len(d.get_parameter("values")) / sum(d.site.shape) for d in deltas.values()}
    rank = found.pop()
    if found or rank != int(rank) or any(d.site.kind == "conv" for d in deltas.values()):
        raise PlaitError(
            "PEFT's SHiRA has r (in + out) entries in every linear; attach with rank=."
        )
    return {"r": int(rank), "fan_in_fan_out": any_transposed(deltas)}


METHOD = Method(
    name="shira",
    title="SHiRA: sparse high rank adapters",
    paper="Bhardwaj et al., 2024, arXiv 2406.13175",
    axis="parameterisation",
    options=ShiraOptions,
    delta=ShiraDelta,
    count=per_site(entries),
    peft=PeftCodec(
        type="SHIRA",
        keys={"values": "shira_weight", "indices": "shira_indices"},
        options=lambda found: {"rank": found.config["r"]},
        config=_peft_config,
        read=_read_peft,
        write=_write_peft,
    ),
)
