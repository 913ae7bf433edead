"""`Case`: one method on one tiny model, with the few moves that every check makes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plait.adapter import (
    Adapter,
    Method,
    attach,
    bind,
    build_adapter,
    install,
    registry,
    routing,
)
from plait.adapter.site import layout, rebuild_site
from plait.adapter.state import find_state
from plait.testing.models import Subject, get_subject, make_model


class NotApplicable(Exception):
    """The property does not exist for this method; the message says why."""


@dataclass(frozen=True)
class Case:
    """A method, the kind of site it is tried on, and the base model's dtype."""

    method: Method
    kind: str
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.method.name} on {self.kind}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def subject(self) -> Subject:
        return get_subject(self.kind)

    @property
    def options(self) -> dict[str, Any]:
        """The method's example, or rank 2 where there is a rank."""
        if self.method.example:
            return dict(self.method.example)
        fields = getattr(self.method.options, "__dataclass_fields__", {})
        return {"rank": 2} if "rank" in fields else {}

    def model(self, dtype: torch.dtype | None = None) -> nn.Module:
        return make_model(self.kind, dtype or self.dtype)

    def attach(self, model: nn.Module, name: str = "a", seed: int = 1, **more: Any) -> Adapter:
        """The method attached to `model`; sites, data and options as this case says."""
        start = self.method.initializer
        data = self.data(model) if start is not None and start().needs else None
        given = {"targets": self._targets(), "data": data, **self.options, **more}
        return attach(model, self.method, name=name, seed=seed, **given)

    def _targets(self) -> Any:
        only = self.method.kinds == {self.subject.kind}
        if self.method.choose is not None or (only and self.method.targets != "all-linear"):
            return None  # the method knows where it belongs
        return self.subject.targets

    # -- inputs ---------------------------------------------------------------------------------

    def x(self, batch: int = 4, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """A batch of inputs; real ones are rounded so that every dtype holds them exactly."""
        g = torch.Generator().manual_seed(seed)
        shape = (batch, *self.subject.shape)
        if self.subject.tokens:
            return torch.randint(self.subject.tokens, shape, generator=g)
        return torch.randn(shape, generator=g).bfloat16().to(dtype or self.dtype)

    def inputs(self) -> list[Tensor]:
        """The batch, and for linear sites also a three-dimensional one."""
        xs = [self.x()]
        if self.subject.kind == "linear":
            xs.append(self.x(batch=6).reshape(2, 3, -1))
        return xs

    def task(self, batch: int = 32) -> tuple[Tensor, Tensor]:
        """Inputs and labels of a small task that the base model does not know."""
        g = torch.Generator().manual_seed(7)
        if self.kind == "module":
            labels = (torch.arange(5) * 3 + torch.arange(batch)[:, None]) % 8
            centres = torch.randn(8, *self.subject.shape[1:], generator=g)
            noise = torch.randn(batch, *self.subject.shape, generator=g)
            return (centres[labels] + 0.3 * noise).to(self.dtype), labels
        labels = torch.arange(batch) % 5
        if self.subject.tokens:
            x = torch.randint(self.subject.tokens, (batch, *self.subject.shape), generator=g)
            x[:, :3] = labels[:, None]
            return x, labels
        centres = torch.randn(5, *self.subject.shape, generator=g)
        x = centres[labels] + 0.3 * torch.randn(batch, *self.subject.shape, generator=g)
        if self.kind == "parameter":
            labels = labels[:, None].expand(-1, self.subject.shape[0])
        return x.to(self.dtype), labels

    def data(self, model: nn.Module) -> list[dict[str, Tensor]]:
        """Batches for initialisers that look at data, in `model`'s dtype."""
        x, labels = self.task(16)
        if x.is_floating_point():
            x = x.to(next(model.parameters()).dtype)
        name = self.subject.input_name
        return [{name: x[:8], "labels": labels[:8]}, {name: x[8:], "labels": labels[8:]}]

    # -- moves ----------------------------------------------------------------------------------

    def output(self, model: nn.Module, x: Tensor) -> Tensor:
        """The model's logits without gradients: the same bits whatever passes came before."""
        with torch.no_grad():
            return self.run(model, x)

    def run(self, model: nn.Module, x: Tensor) -> Tensor:
        """The model's logits; routed methods get their example context."""
        with self.context(model):
            return model(**{self.subject.input_name: x}).logits

    def context(self, model: nn.Module) -> Any:
        if find_state(model) is None or not self.method.example_context:
            return contextlib.nullcontext()
        return routing(model, **self.method.example_context)

    def adapted(self, name: str = "a", seed: int = 1) -> tuple[nn.Module, Adapter]:
        """A fresh model with a perturbed adapter, active."""
        model = self.model()
        adapter = self.attach(model, name, seed)
        perturb(adapter, seed)
        return model, adapter


def perturb(adapter: Adapter, seed: int = 1, size: float = 0.1) -> None:
    """Add noise to every trainable parameter: the adapter as it is somewhere in training."""
    g = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            noise = size * torch.randn(parameter.shape, generator=g)
            parameter.add_(noise.to(parameter))


def rebuilt(adapter: Adapter, model: nn.Module) -> Adapter:
    """The adapter once more on `model`, from what a file would hold: tensors, options, seed."""
    pieces, options = [], {}
    for path, delta in adapter.deltas.items():
        site = delta.site
        pieces.append((rebuild_site(path, layout(site), site.shape, site.details), type(delta)))
        options[path] = type(delta.options)(**delta.described_options())
    first = next(iter(adapter.deltas.values()))
    new = build_adapter(
        adapter.name,
        adapter.method,
        pieces,
        adapter.options,
        by_site=options,
        seed=adapter.seed,
        dtype=first.dtype,
    )
    for path, delta in adapter.deltas.items():
        target = new.deltas[path]
        for key in type(delta).optional & set(delta._buffers):
            target.frozen(key, *delta.get_buffer(key).shape)
    new.load_state_dict({k: t.clone() for k, t in adapter.state_dict().items()})
    return install(model, bind(new, model))


@contextlib.contextmanager
def known(method: Method) -> Iterator[None]:
    """Within the block the registry answers to the method's name (files and pickles need that)."""
    if method.name in registry.names():
        yield
        return
    registry.register(method)
    try:
        yield
    finally:
        registry._registered.pop(method.name, None)


# -- what was measured ----------------------------------------------------------------------------


def traits_all(adapter: Adapter, name: str) -> bool:
    """Does every delta have the trait?"""
    return all(getattr(d.traits, name) for d in adapter.deltas.values())


def traits_any(adapter: Adapter, name: str) -> bool:
    return any(getattr(d.traits, name) for d in adapter.deltas.values())


def close(got: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    """The largest difference must stay below `tolerance` of the largest wanted number."""
    got, wanted = got.detach().double(), wanted.detach().double()
    assert got.shape == wanted.shape, f"{what}: {list(got.shape)} is not {list(wanted.shape)}"
    gap = float((got - wanted).abs().max())
    scale = max(float(wanted.abs().max()), 1e-12)
    assert gap <= tolerance * scale, (
        f"{what}: off by {gap / scale:.2e} of the largest number (allowed {tolerance:.0e})"
    )


def same(got: Tensor, wanted: Tensor, what: str) -> None:
    """Bit for bit."""
    assert got.dtype == wanted.dtype, f"{what}: {got.dtype} is not {wanted.dtype}"
    got, wanted = got.detach(), wanted.detach()
    gap = 0.0 if got.shape != wanted.shape else float((got - wanted).abs().double().max())
    assert torch.equal(got, wanted), f"{what}: differs (by {gap:.2e}), but must be equal in bits"


def same_tensors(got: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    assert set(got) == set(wanted), f"{what}: other names ({set(got) ^ set(wanted)})"
    for name, tensor in wanted.items():
        same(got[name], tensor, f"{what}: {name}")


def must_refuse(call: Any, what: str) -> None:
    """`call` must raise a PlaitError."""
    from plait.errors import PlaitError

    try:
        call()
    except PlaitError:
        return
    raise AssertionError(f"{what} must be refused with a PlaitError")
