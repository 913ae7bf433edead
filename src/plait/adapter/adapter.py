"""`Adapter`: one named set of deltas, attached to a model or on its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from plait.adapter.delta import Delta
from plait.adapter.method import Method
from plait.adapter.pair import Pair, PairDelta
from plait.adapter.shared import SharedTensors
from plait.errors import FormatError, PlaitError
from plait.linalg import all_finite

if TYPE_CHECKING:
    from plait.adapter.state import ModelState

_SHARED = "shared:"


class DeltaMap(dict[str, Delta]):
    """{site path: delta}; a wrong path is an error that names the nearest site."""

    def __missing__(self, path: str) -> Delta:
        from plait.errors import unknown

        raise unknown("site", path, self)


@dataclass(eq=False)
class Adapter:
    """The deltas of one method under one name.

    Attributes: `deltas` {site path: Delta}; `shared`, what several deltas read; `options`, as
    given;
    `info`, free-form facts kept in the file (base name, fingerprint, training).
    """

    name: str
    method: Method
    options: Any
    deltas: DeltaMap
    shared: SharedTensors
    seed: int
    info: dict[str, Any] = field(default_factory=dict)
    state: ModelState | None = field(default=None, repr=False)

    @property
    def model(self) -> nn.Module | None:
        """The model it is attached to, or None."""
        return None if self.state is None else self.state.model

    # -- parameters -----------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """("site path.parameter", tensor) of deltas, then "shared:name"; each tensor once."""
        for path, delta in self.deltas.items():
            for name, parameter in delta.named_parameters():
                yield f"{path}.{name}", parameter
        for name, parameter in self.shared.named_parameters():
            yield _SHARED + name, parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        for _, parameter in self.named_parameters():
            yield parameter

    def num_parameters(self, trainable_only: bool = True) -> int:
        """How many numbers it has: those that train, or also its frozen stored ones."""
        count = sum(p.numel() for p in self.parameters())
        if trainable_only:
            return count
        return sum(t.numel() for t in self.state_dict().values())

    def requires_grad_(self, on: bool = True) -> Adapter:
        """Train this adapter, or freeze it (its activity is another matter: `activate`)."""
        for parameter in self.parameters():
            parameter.requires_grad_(on)
        return self

    def pairs(self) -> list[Pair]:
        """Every trainable (A, B) pair, for rules that need both gradients together."""
        return [p for d in self.deltas.values() if isinstance(d, PairDelta) for p in d.pairs()]

    # -- tensors in and out ---------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor a file must hold (sharded tensors gathered); seeded ones are not among
        them."""
        found = {
            f"{path}.{name}": tensor.detach()
            for path, delta in self.deltas.items()
            for name, tensor in delta.own_tensors()
        }
        found |= {_SHARED + n: t.detach() for n, t in self.shared.state_dict().items()}
        return {k: t.full_tensor() if hasattr(t, "full_tensor") else t for k, t in found.items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor], assign: bool = False) -> None:
        """Copy `tensors` in; names and shapes must be exactly this adapter's.

        `assign` takes over the tensors themselves, dtypes included, instead of their values.
        """
        mine = self._targets()
        if missing := sorted(set(mine) - set(tensors)):
            raise FormatError(
                f"adapter {self.name!r}: tensor {missing[0]!r} is missing ({len(missing)} in all)."
            )
        if extra := sorted(set(tensors) - set(mine)):
            raise FormatError(
                f"adapter {self.name!r}: tensor {extra[0]!r} is unknown ({len(extra)} in all)."
            )
        for key, target in mine.items():
            if target.shape != tensors[key].shape:
                raise FormatError(
                    f"adapter {self.name!r}: {key!r} has shape {list(tensors[key].shape)} in the "
                    f"file, but {list(target.shape)} is needed."
                )
        with torch.no_grad():
            for key, target in mine.items():
                if assign:
                    target.data = tensors[key]
                else:
                    target.copy_(tensors[key])

    def _targets(self) -> dict[str, Tensor]:
        own = {f"{p}.{n}": t for p, d in self.deltas.items() for n, t in d.own_tensors()}
        shared = self.shared.state_dict(keep_vars=True)
        return own | {_SHARED + n: t for n, t in shared.items()}

    def seeded_tensors(self) -> dict[str, Tensor]:
        """The frozen random tensors that the seed regenerates, by the same kind of names."""
        own = {f"{p}.{n}": t for p, d in self.deltas.items() for n, t in d.seeded_tensors().items()}
        return own | {_SHARED + n: t for n, t in self.shared.seeded().items()}

    # -- the whole life -------------------------------------------------------------------------

    def save(self, path: str | Path, format: str = "plait") -> Path:
        """Write a folder ("plait" or "peft") or a single file ("kohya", "diffusers"),
        atomically."""
        from plait.adapter.formats import save_adapter

        return save_adapter(self, path, format)

    def to_lora(self, rank: int | None = None, energy: float | None = None) -> Adapter:
        """This adapter as a plain LoRA (see `plait.adapter.convert.to_lora`)."""
        from plait.adapter.convert import to_lora

        return to_lora(self, rank, energy)

    def auxiliary_loss(self) -> Tensor | None:
        """The routers' losses of the last forward, or None."""
        if self.state is None:
            return None
        by_class: dict[type[Delta], list[Delta]] = {}
        for delta in self.deltas.values():
            by_class.setdefault(type(delta), []).append(delta)
        losses = [c.auxiliary_loss(ds, self.state.context) for c, ds in by_class.items()]
        found = [loss for loss in losses if loss is not None]
        return torch.stack(found).sum() if found else None

    def check(self) -> None:
        """Raise when a tensor holds NaN or infinity."""
        for key, tensor in self.state_dict().items():
            if tensor.is_floating_point() and not all_finite(tensor):
                raise PlaitError(f"adapter {self.name!r}: {key!r} holds NaN or infinity.")
