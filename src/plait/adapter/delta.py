"""`Delta`: one adapter's change at one site, and the traits that shared code asks about.

A method implements some of

    reset()      write the start values (never called when a file is loaded)
    forward(x)   the additive change of the site's output
    dense()      dW, in the site's canonical orientation
    factors()    dW as an exact LowRank, when the trait `low_rank` says there is one
    adapt(...)   the whole adapted output, when something faster than base + forward exists

and inherits the rest: a delta with factors rides the fused linear, any other is `site.apply(x,
dense())`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.adapter import seeds
from plait.adapter.context import Context
from plait.adapter.shared import SharedTensors
from plait.adapter.site import Site, first_input
from plait.errors import PlaitError
from plait.linalg import LowRank


@dataclass(frozen=True)
class Traits:
    """What shared code may ask of a delta."""

    low_rank: bool = False  # factors() is exact at every step; the fused linear applies
    depends_on_base: bool = False  # dW is a function of W; dense() needs an attached site
    reads_output: bool = False  # forward(x, y) wants y, the base's output (bias included)
    changes_bias: bool = False  # bias() returns a change of the bias
    linear_in_x: bool = True  # dense() exists: can be fused, exported and merged
    reads_input: bool = False  # on a whole block: x is what went in, not what came out
    edits_base: bool = False  # while active W itself is rewritten (reversibly); must be alone
    zero_start: bool = True  # the adapted model starts equal to the base model


@dataclass(frozen=True)
class Build:
    """What a delta is built from, beside its site and options."""

    seed: int
    shared: SharedTensors
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Options:
    """Base of every method's options."""


class Delta(nn.Module):
    """The change dW of one adapter at one site."""

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    traits: Traits = Traits()
    optional: ClassVar[frozenset[str]] = frozenset()
    """Saved buffers that only some adapters have (a held-back start); a file decides."""
    gradient_is_exact: ClassVar[bool] = True
    """False where the method computes something else than the derivative on purpose (a detached
    norm, a straight-through estimate): finite differences then prove nothing."""
    site: Site
    options: Any
    seed: int
    dtype: torch.dtype
    device: torch.device
    context: Context  # what routing needs beside x; set when the adapter is attached

    def __init__(self, site: Site, options: Any, build: Build) -> None:
        super().__init__()
        # Straight into __dict__: nn.Module's __setattr__ is slow, and would make `shared`, which
        # the model owns, a child of every delta.
        self.__dict__.update(
            site=site,
            options=options,
            seed=build.seed,
            dtype=build.dtype,
            device=build.device,
            context=Context(),
            shared=build.shared,
        )
        self.build()

    shared: SharedTensors

    # -- what a method implements -------------------------------------------------------------

    @classmethod
    def prepare(cls, sites: Sequence[Site], options: Any, shared: SharedTensors) -> None:
        """Register what the adapter's deltas share, before any of them is built."""

    @property
    def dropout(self) -> float:
        """Probability of dropping an input feature now: the option of that name, in training."""
        return getattr(self.options, "dropout", 0.0) if self.training else 0.0

    def build(self) -> None:
        """Allocate parameters and buffers (zeros, or regenerated from the seed)."""

    def reset(self) -> None:
        """Write the start values."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The additive change of the site's output for input `x` (and base output `y`)."""
        if self.dropout and x.is_floating_point():
            x = F.dropout(x, self.dropout)
        low = self.factors()
        if low is not None:
            change = self.site.apply_low_rank(x, low.A.to(_dtype(x, low.A)), _scaled_B(low, x))
        else:
            weight = self.dense()
            change = self.site.apply(x, weight.to(_dtype(x, weight)))
        bias = self.bias()
        return change if bias is None else change + _broadcast(bias.to(change.dtype), change, self)

    def dense(self) -> Tensor:
        """dW in canonical orientation, scaling included; in the adapter's dtype."""
        low = self.factors()
        if low is None:
            raise PlaitError(
                f"{type(self).__name__} at {self.site.path!r} is not linear in its input, "
                "so it has no dW and can be neither fused nor exported."
            )
        return low.dense()

    def factors(self) -> LowRank | None:
        """dW as an exact LowRank, or None."""
        return None

    def sparse(self) -> tuple[Tensor, Tensor] | None:
        """dW as distinct positions in the flattened W and the values there, or None."""
        return None

    def bias(self) -> Tensor | None:
        """The change of the bias [out], or None."""
        return None

    def adapt(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted output: base + change. Override for a faster or a replacing form."""
        x = first_input(args, kwargs)
        y = self.site.forward(*args, **kwargs)
        return add_change(y, lambda out: self.forward(self.seen(x, out), out))

    def seen(self, x: Tensor, y: Tensor) -> Tensor:
        """What `forward` gets as x: a site's input, on a whole block mostly the block's output."""
        return y if self.site.kind == "module" and not self.traits.reads_input else x

    def attached(self) -> None:
        """Called once the site has its module and the parameters their values (started or loaded).

        The place to derive what depends on W and is not worth storing (singular vectors, norms):
        `seeded_value` keeps it out of the file.
        """

    def activated(self) -> None:
        """Called when the adapter becomes active (deltas with `edits_base` write W here)."""

    def deactivated(self) -> None:
        """Called when it no longer is (and put W back here, bit for bit)."""

    @classmethod
    def auxiliary_loss(cls, deltas: Sequence[Delta], context: Context) -> Tensor | None:
        """A loss to add to the task's, from what the deltas recorded in `context`."""
        return None

    # -- building blocks for methods ----------------------------------------------------------

    def parameter(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
        """Register a trainable parameter of zeros."""
        value = torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)
        self.register_parameter(name, nn.Parameter(value))
        return getattr(self, name)

    def frozen(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Register a frozen tensor of zeros that is saved with the adapter."""
        value = torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)
        self.register_buffer(name, value)
        return value

    def seeded(self, name: str, kind: str, *shape: int) -> Tensor:
        """Register a frozen random tensor that is regenerated from the seed, never saved."""
        value = seeds.draw(kind, shape, self.seed, self.site.path, name)
        return self.seeded_value(name, value.to(self.dtype))

    def seeded_value(self, name: str, value: Tensor) -> Tensor:
        """Register a tensor that the method itself regenerates from `self.generator(...)`."""
        self.register_buffer(name, value.to(self.device), persistent=False)
        return value

    def generator(self, *names: str) -> torch.Generator:
        """This site's own CPU random stream of that name."""
        return seeds.generator(self.seed, self.site.path, *names)

    def start(self, name: str, kind: str) -> None:
        """Fill the parameter `name` from a distribution of `plait.adapter.seeds`."""
        target = self.get_parameter(name)
        value = seeds.draw(kind, tuple(target.shape), self.seed, self.site.path, "start", name)
        with torch.no_grad():
            target.copy_(value)

    def base_weight(self) -> Tensor:
        """W at this site in the adapter's dtype, detached."""
        return self.site.weight().detach().to(self.dtype)

    # -- what shared code uses ----------------------------------------------------------------

    def own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and saved buffers, by name."""
        yield from self.state_dict(keep_vars=True).items()

    def seeded_tensors(self) -> dict[str, Tensor]:
        saved = {n for n, _ in self.own_tensors()}
        return {n: b for n, b in self.named_buffers() if n not in saved}

    def described_options(self) -> dict[str, Any]:
        """The options as they stand now (ranks may have changed in training)."""
        return dataclasses.asdict(self.options)

    def extra_repr(self) -> str:
        return f"{self.site.path or 'bare'}, {self.site.kind} {list(self.site.shape)}"


def _dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else weight.dtype


def _scaled_B(low: LowRank, x: Tensor) -> Tensor:
    return (low.B * low.scale).to(_dtype(x, low.B))


def _broadcast(bias: Tensor, y: Tensor, delta: Delta) -> Tensor:
    if delta.site.kind == "conv":  # channels come before the spatial axes
        return bias.reshape(-1, *([1] * (y.dim() - 2)))
    return bias


def add_change(output: Any, change: Any) -> Any:
    """`output` plus `change(tensor)`, where a block may return a tuple led by its hidden state."""
    if isinstance(output, tuple):
        return (output[0] + change(output[0]).to(output[0].dtype), *output[1:])
    return output + change(output).to(output.dtype)
