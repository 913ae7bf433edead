"""How a validation loss falls with gates on which training depends too.

    d L_val / da = d_a L_val(t_K, a) + (d t_K / da)^T d_t L_val(t_K, a)
    t_{k+1} = t_k - eta d_t L_train(t_k, a)

`direct` takes the first term at t_0. `unrolled` differentiates through all K steps; its memory is
K training graphs. `finite_difference` has K = 1 and two more training passes in place of second
derivatives (Liu et al., 2018, arXiv 1806.09055). No pass has dropout: two passes whose difference
counts must not differ by their masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from plait import kernels
from plait.rules._forwards import evaluating, frozen, holding
from plait.rules._passes import loss_of
from plait.rules._recent_batches import Batch

_SHARE = 2e-4
"""Length of the finite difference, as a share of the length of all parameters together: between
what float32 rounds away and what third derivatives add."""


@dataclass
class Bilevel:
    """The two losses at gates `gates` [N] (a leaf that the model's forward reads).

    `validation` and each step of `training` hold batches whose mean loss counts.
    """

    model: nn.Module
    parameters: Sequence[nn.Parameter]
    gates: Tensor
    validation: Sequence[Batch]
    training: Sequence[Sequence[Batch]] = ()
    rate: float = 0.0

    def direct(self) -> Tensor:
        with evaluating(self.model), frozen(self.parameters):
            return self._gradients(self.validation, [self.gates])[0]

    def finite_difference(self) -> Tensor:
        """One inner step, on the last training step's batches."""
        batches, theta = self.training[-1], [p.data for p in self.parameters]
        with evaluating(self.model):
            slope = self._gradients(batches, self.parameters)
            with self._at(torch._foreach_add(theta, slope, alpha=-self.rate)):
                found, *v = self._gradients(self.validation, [self.gates, *self.parameters])
            length, norm = (torch.stack(torch._foreach_norm(x)).norm() for x in (theta, v))
            reach = _SHARE * length / norm.clamp_min(torch.finfo(norm.dtype).tiny)
            ends = []
            for sign in (1, -1):
                moved = [t + sign * reach * d for t, d in zip(theta, v, strict=True)]
                with self._at(moved), frozen(self.parameters):
                    ends.append(self._gradients(batches, [self.gates])[0])
        return found - self.rate * (ends[0] - ends[1]) / (2 * reach)

    def unrolled(self) -> Tensor:
        names = {id(p): name for name, p in self.model.named_parameters()}
        theta = {names[id(p)]: p.detach().requires_grad_() for p in self.parameters}
        with evaluating(self.model), _twice_differentiable():
            for batches in self.training:
                losses = [share * self._loss(b, theta) for b, share in _shares(batches)]
                loss = torch.stack(losses).sum()
                slope = _grad(loss, list(theta.values()), create_graph=True)
                theta = {
                    name: value - self.rate * g
                    for (name, value), g in zip(theta.items(), slope, strict=True)
                }
            losses = [share * self._loss(b, theta) for b, share in _shares(self.validation)]
            return _grad(torch.stack(losses).sum(), [self.gates])[0]

    def _at(self, values: Sequence[Tensor]) -> Any:
        return holding(self.parameters, values)

    def _loss(self, batch: Batch, theta: dict[str, Tensor] | None = None) -> Tensor:
        args, kwargs = batch
        if theta is None:
            return loss_of(self.model(*args, **kwargs))
        return loss_of(functional_call(self.model, theta, args, kwargs))

    def _gradients(self, batches: Sequence[Batch], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Of the mean loss; one batch's graph at a time."""
        total: list[Tensor] | None = None
        for batch, share in _shares(batches):
            found = _grad(share * self._loss(batch), inputs)
            if total is None:
                total = found
            else:
                torch._foreach_add_(total, found)
        assert total is not None
        return total


ESTIMATORS: dict[str, Callable[[Bilevel], Tensor]] = {
    "direct": Bilevel.direct,
    "unroll1": Bilevel.finite_difference,
    "unrollK": Bilevel.unrolled,
}


def _shares(batches: Sequence[Batch]) -> Iterator[tuple[Batch, float]]:
    """Each batch with its weight: 1 where the model itself divides by the whole step's tokens."""
    for batch in batches:
        yield batch, 1.0 if batch[1].get("num_items_in_batch") is not None else 1 / len(batches)


def _grad(loss: Tensor, inputs: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    found = torch.autograd.grad(loss, inputs, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    # Fused attention, like fused linears, can be differentiated once only.
    with kernels.use_reference(), sdpa_kernel(SDPBackend.MATH):
        yield
