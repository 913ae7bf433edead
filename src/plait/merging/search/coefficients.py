"""`Coefficients`: one number for each adapter x group of sites, applied without merging anything.

    raw z [k, g] ──form──► c [k, g] ──by site──► plait.activate(model, {name: {site: c[i, group]}})

The adapters stay attached and active; their weights are entries of c, gradients included, so a
search costs the adapters' own forward (2 k r (in + out) a token and site) and holds k x g numbers.
Where a site has chunks, its weight is a column [out, 1] (or row [1, in]) made of their c: the rows
of B (the columns of A) are scaled on the way, which is r out (r in) more products a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from plait.adapter import activate, adapters
from plait.adapter.weighting import Weight
from plait.errors import PlaitError, unknown
from plait.merging.search.groups import Along, Chunks, Grouping, parts_of
from plait.statistics.frozen import frozen

Form = Literal["free", "softmax", "sigmoid"]


class Coefficients:
    """The space that a search moves in.

    Args:
        model: with the adapters attached. What is active is put back after a search.
        names: of the k adapters.
        grouping: sites that share a coefficient: all of an adapter's, a layer's (the path up to its
            first number), none, or those for which a function of the path gives the same name.
        chunks, along: pieces of a site's rows or columns with coefficients of their own (see
            `plait.merging.search.groups`); more than there are gives one to each.
        form: c = z ("free"), softmax of z over the adapters, or sigmoid of z.
        start: c at the start, a number or [k] or [k, g]; None is 1 / k.
        bounds: (least, greatest) c of form "free"; steps are projected onto them.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        *,
        grouping: Grouping | Callable[[str], str] = "adapter",
        chunks: Chunks = 1,
        along: Along = "rows",
        form: Form = "free",
        start: float | Sequence[float] | Tensor | None = None,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        if isinstance(names, str) or not names or len(set(names)) < len(names):
            raise PlaitError("a search takes a list of different adapters' names.")
        if form not in get_args(Form):
            raise unknown("form", form, get_args(Form))
        if bounds is not None and (form != "free" or not bounds[0] < bounds[1]):
            raise PlaitError("bounds are (least, greatest) of coefficients of form 'free'.")
        known = adapters(model)
        for name in names:
            if name not in known:
                raise unknown("adapter", name, known)
        self.model, self.names, self.form, self.bounds = model, list(names), form, bounds
        self.adapters = [known[name] for name in names]
        self.groups, self.parts = parts_of(self.adapters, grouping, chunks, along)
        if not self.groups:
            raise PlaitError("there is nothing to search: every site is held at the start.")
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        first = self._filled(1 / len(names) if start is None else start)
        self.held: list[float] = first[:, 0].tolist()
        """Coefficients of sites that have none in the search."""
        if bool((first != first[:, :1]).any()) and not all(p.groups for p in self.parts.values()):
            raise PlaitError("with sites held at the start, start is a number or one an adapter.")
        self.start = self.raw_of(first)

    @property
    def shape(self) -> tuple[int, int]:
        """(k adapters, g groups)."""
        return len(self.names), len(self.groups)

    def _filled(self, start: float | Sequence[float] | Tensor) -> Tensor:
        value = torch.as_tensor(start, dtype=torch.float64)
        if value.dim() == 1:
            value = value[:, None]
        try:
            return value.expand(self.shape).clone()
        except RuntimeError as error:
            raise PlaitError(
                f"start is {list(value.shape)}; give a number, [{self.shape[0]}] or "
                f"{list(self.shape)}."
            ) from error

    # -- raw numbers and coefficients ------------------------------------------------------------

    def values(self, raw: Tensor) -> Tensor:
        """c [k, g] of raw z [k, g], differentiable."""
        if self.form == "softmax":
            return raw.softmax(0)
        return raw.sigmoid() if self.form == "sigmoid" else raw

    def raw_of(self, coefficients: Tensor) -> Tensor:
        """z of c, float64 on the CPU."""
        c = coefficients.detach().to("cpu", torch.float64)
        least, most = (0.0, 1.0) if self.form != "free" else self.bounds or (-torch.inf, torch.inf)
        if bool(((c < least) | (c > most)).any()):
            raise PlaitError(f"coefficients must lie in [{least}, {most}] (form {self.form!r}).")
        if self.form == "softmax":
            return c.clamp_min(1e-12).log()
        return c.clamp(1e-12, 1 - 1e-12).logit() if self.form == "sigmoid" else c

    def project(self, raw: Tensor) -> Tensor:
        """z brought back within the bounds."""
        return raw if self.bounds is None else raw.clamp(*self.bounds)

    def alone(self, index: int) -> Tensor:
        """The coefficients of that adapter and no other."""
        return torch.eye(len(self.names), dtype=torch.float64)[index, :, None].expand(self.shape)

    # -- on the model ----------------------------------------------------------------------------

    @contextmanager
    def searching(self) -> Iterator[None]:
        """Within the block the model is in eval mode with every parameter frozen (see `use`)."""
        with frozen(self.model):
            yield

    def use(self, coefficients: Tensor) -> None:
        """Activate the adapters with these coefficients [k, g], with their gradients if any."""
        activate(self.model, dict(zip(self.names, self.weights(coefficients), strict=True)))

    def weights(self, coefficients: Tensor) -> list[dict[str, Weight]]:
        """{site path: weight} for each adapter, as `plait.activate` takes it."""
        here = coefficients.to(self.device)
        # One by one: an entry is taken once a group, not once a site.
        rows: list[Any] = here.tolist()
        if here.requires_grad:
            rows = [row.unbind() for row in here.unbind()]
        return [
            {path: self.parts[path].weight(row, values, held) for path in adapter.deltas}
            for adapter, row, values, held in zip(self.adapters, rows, here, self.held, strict=True)
        ]

    def described_weights(self, coefficients: Tensor) -> dict[str, dict[str, Any]]:
        """{name: {site path: weight}} as plain data (see `plait.merging.search.stored`)."""
        rows = coefficients.detach().tolist()
        return {
            name: {path: self.parts[path].described(row, held) for path in adapter.deltas}
            for name, adapter, row, held in zip(
                self.names, self.adapters, rows, self.held, strict=True
            )
        }

    def described(self) -> dict:
        """What makes a search this one and no other, as a log remembers it."""
        return {
            "adapters": self.names,
            "groups": self.groups,
            "form": self.form,
            "bounds": self.bounds and list(self.bounds),
            "start": self.start.tolist(),
        }
