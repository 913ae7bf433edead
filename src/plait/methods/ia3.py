"""(IA)^3: one learned factor for every channel of keys, values and the feed-forward's inside.

    keys, values   x ──► W, b ──► * l (out)          feed-forward   x ──► * l (in) ──► W, b

dW = diag(l - 1) W with a bias change (l - 1) b, or dW = W diag(l - 1) where the site is a
feed-forward's down projection (`feedforward`). l = 1 at the start, where the model is the base.
Two active adapters add their changes; a product of factors is their fusion one after the other.
Paper: Liu et al., 2022, arXiv 2205.05638. Parameters: out, or in at feed-forward sites.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.adapter import Delta, Method, Options, PeftCodec, Site, Traits, first_input, per_site
from plait.adapter.build import site_matches
from plait.adapter.formats.peft_codec import any_transposed
from plait.adapter.method import PeftSite
from plait.errors import PlaitError
from plait.methods._rescale import rescale

FEEDFORWARD = ("down_proj", "fc2", "dense_4h_to_h", "mlp.c_proj", "wo", "output.dense")


@dataclass(frozen=True)
class Ia3Options(Options):
    feedforward: Sequence[str] = FEEDFORWARD
    """Sites (path endings or patterns) whose input is scaled, as the paper does for the
    feed-forward's hidden layer; every other site's output is."""


class Ia3Delta(Delta):
    kinds = frozenset({"linear", "conv"})
    options: Ia3Options
    l: Tensor

    def build(self) -> None:
        self.feedforward = _is_feedforward(self.site, self.options)
        self.traits = Traits(
            depends_on_base=True,
            reads_output=not self.feedforward,
            changes_bias=not self.feedforward,
        )
        if self.feedforward and getattr(self.site.module, "groups", 1) != 1:
            raise PlaitError(
                f"ia3 scales no input of a grouped convolution; take {self.site.path!r} out of "
                "feedforward=."
            )
        self.parameter("l", _length(self.site, self.options))

    def reset(self) -> None:
        with torch.no_grad():
            self.l.fill_(1.0)

    def dense(self) -> Tensor:
        change = self.l - 1
        return self.base_weight() * (
            self._unrolled(change) if self.feedforward else change[:, None]
        )

    def bias(self) -> Tensor | None:
        bias = self.site.bias()
        if self.feedforward or bias is None:
            return None
        return (self.l - 1) * bias.detach().to(self.l.dtype)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        change = (self.l - 1).to(x.dtype)
        if self.feedforward:
            return self.site.apply(x * self._along(change, x), self.site.weight())
        y = self.site.forward(x) if y is None else y
        return y * self._along(change, y)

    def adapt(self, *args: Any, **kwargs: Any) -> Any:
        if self.site.kind == "conv":
            return super().adapt(*args, **kwargs)
        if self.feedforward:
            x = first_input(args, kwargs)
            return self.site.forward(rescale(x, self.l - 1))
        return rescale(self.site.forward(*args, **kwargs), self.l - 1)

    def _along(self, channels: Tensor, like: Tensor) -> Tensor:
        if self.site.kind != "conv":
            return channels
        return channels.reshape(-1, *([1] * (like.dim() - 2)))

    def _unrolled(self, change: Tensor) -> Tensor:
        """One factor for every column of W: a convolution's channel has one for each tap."""
        return change.repeat_interleave(self.site.in_features // len(change))


def _is_feedforward(site: Site, o: Ia3Options) -> bool:
    return any(site_matches(pattern, site.path) for pattern in o.feedforward)


def _length(site: Site, o: Ia3Options) -> int:
    if not _is_feedforward(site, o):
        return site.out_features
    return site.details["kernel"][0] if site.kind == "conv" else site.in_features


def _peft_options(found: PeftSite) -> dict[str, Any]:
    inner = found.config.get("feedforward_modules") or []
    # PEFT takes any path that ends in one of the names, within a word too.
    return {"feedforward": [inner] if isinstance(inner, str) else [f".*{n}" for n in inner]}


def _read_peft(delta: Delta, found: PeftSite) -> None:
    delta.get_parameter("l").copy_(found.tensors["ia3_l"].flatten())


def _write_peft(delta: Delta) -> dict[str, Tensor]:
    assert isinstance(delta, Ia3Delta)
    if delta.site.kind == "conv":
        return {"ia3_l": delta.l.reshape(1, -1, *[1] * (len(delta.site.details["kernel"]) - 1))}
    return {"ia3_l": delta.l.reshape(1, -1) if delta.feedforward else delta.l.reshape(-1, 1)}


def _peft_config(deltas: Mapping[str, Delta]) -> dict[str, Any]:
    inner = [p for p, d in deltas.items() if isinstance(d, Ia3Delta) and d.feedforward]
    # A pattern, because PEFT wants a list's names to be among its target_modules too.
    pattern = "|".join(re.escape(p) for p in sorted(inner)) or "(?!)"
    return {"feedforward_modules": pattern, "fan_in_fan_out": any_transposed(deltas)}


METHOD = Method(
    name="ia3",
    title="(IA)^3: infused adapter by inhibiting and amplifying inner activations",
    paper="Liu et al., 2022, arXiv 2205.05638",
    axis="parameterisation",
    options=Ia3Options,
    delta=Ia3Delta,
    count=per_site(_length),
    targets=("k_proj", "v_proj", "down_proj"),
    peft=PeftCodec(
        type="IA3",
        keys={"l": "ia3_l"},
        options=_peft_options,
        config=_peft_config,
        read=_read_peft,
        write=_write_peft,
    ),
)
