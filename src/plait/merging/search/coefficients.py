"""`Coefficients`: one number for each adapter x group of sites, applied without merging anything.

    raw z [k, g] ──form──► c [k, g] ──by site──► plait.activate(model, {name: {site: c[i, group]}})

The adapters stay attached and active; their weights are entries of c, gradients included, so a
search costs the adapters' own forward (2 k r (in + out) a token and site) and holds k x g numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from plait.adapter import activate, adapters
from plait.errors import PlaitError, unknown
from plait.statistics.frozen import frozen

Grouping = Literal["adapter", "layer", "site"]
Form = Literal["free", "softmax", "sigmoid"]
_LAYER = re.compile(r"^(.*?(?:^|\.)\d+)(?:\.|$)")


class Coefficients:
    """The space that a search moves in.

    Args:
        model: with the adapters attached. What is active is put back after a search.
        names: of the k adapters.
        grouping: sites that share a coefficient: all of an adapter's, a layer's (the path up to its
            first number), none, or those for which a function of the path gives the same name.
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
        grouped = _grouping(grouping)
        paths = dict.fromkeys(path for a in self.adapters for path in a.deltas)
        self.groups = list(dict.fromkeys(grouped(path) for path in paths))
        self.member = {path: self.groups.index(grouped(path)) for path in paths}
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.start = self.raw_of(self._filled(1 / len(names) if start is None else start))

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

    # -- on the model ----------------------------------------------------------------------------

    @contextmanager
    def searching(self) -> Iterator[None]:
        """Within the block the model is in eval mode with every parameter frozen (see `use`)."""
        with frozen(self.model):
            yield

    def use(self, coefficients: Tensor) -> None:
        """Activate the adapters with these coefficients [k, g], with their gradients if any."""
        if coefficients.requires_grad:
            here = coefficients.to(self.device)
            rows = [[here[i, j] for j in range(self.shape[1])] for i in range(self.shape[0])]
        else:
            rows = coefficients.tolist()
        activate(self.model, dict(zip(self.names, self._by_site(rows), strict=True)))

    def weights(self, coefficients: Tensor) -> list[dict[str, float]]:
        """What `plait.merge` takes as weights, one mapping for each adapter."""
        return self._by_site(coefficients.detach().tolist())

    def _by_site(self, rows: Sequence[Sequence[float | Tensor]]) -> list[dict]:
        return [
            {path: row[self.member[path]] for path in adapter.deltas}
            for adapter, row in zip(self.adapters, rows, strict=True)
        ]

    def described(self) -> dict:
        """What makes a search this one and no other, as a log remembers it."""
        return {
            "adapters": self.names,
            "groups": self.groups,
            "form": self.form,
            "bounds": self.bounds and list(self.bounds),
            "start": self.start.tolist(),
        }


def _grouping(grouping: Grouping | Callable[[str], str]) -> Callable[[str], str]:
    if callable(grouping):
        return grouping
    if grouping not in get_args(Grouping):
        raise unknown("grouping", grouping, get_args(Grouping))
    return {"adapter": lambda path: "all", "layer": layer_of, "site": lambda path: path}[grouping]


def layer_of(path: str) -> str:
    """The path up to its first number ("model.layers.3"); one without a number is its own layer."""
    found = _LAYER.match(path)
    return found.group(1) if found else path
