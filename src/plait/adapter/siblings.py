"""Linears that read the same input (q, k, v; gate, up) run as one fused node, without model code.

Nothing tells a module that its sibling will read the same tensor, so this is learned: the first
pass notes which siblings were called with the very tensor that their first one got. From then on
that first one computes all of them in one node (one stacked A product, one dropout mask, one
accumulated input gradient) and the others, when they are called with the same tensor, hand out
what is ready. A sibling called with anything else computes for itself, and after a few such misses
is left out. A plan called again with a tensor that it has seen (a training loop that feeds one
tensor for ever) begins another pass: what an earlier one left ready is stale then.

What was learned changes results by rounding alone: a sibling that runs alone on a shared input
takes the seed of its leader's dropout mask, so the random stream is the same in a resumed run.
Passes without gradients are not grouped: a model's answers are the same bits from the first call
on.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from plait import kernels
from plait.adapter.seeds import fresh_seed

if TYPE_CHECKING:
    from plait.adapter.plans import Fused

_MAX_MISSES = 3


class Siblings:
    """The fused plans on linears of one parent module with one input width."""

    def __init__(self) -> None:
        self.followers: dict[Fused, list[Fused]] = {}
        """Of each leader, the siblings that read its input."""
        self.misses: dict[Fused, int] = {}
        self.seen: dict[Fused, tuple[Any, int]] = {}
        """What each was last called with: a weak reference to the input, and its version."""
        self._forget()

    def _forget(self) -> None:
        self.leader: Fused | None = None
        self.source: Any = _nothing  # weak: the input of the pass under way
        self.mark = 0
        self.seed: int | None = None
        self.ready: dict[Fused, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:  # weak references and pending outputs do not travel
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def run(self, plan: Fused, x: Tensor) -> Tensor:
        """The output of `plan` for `x`, from the group where one has been learned."""
        mark = x._version
        before, known = self.seen.get(plan, (_nothing, 0))
        again = before() is x and known == mark
        self.seen[plan] = (weakref.ref(x), mark)
        if not again and self.source() is x and self.mark == mark:
            output = self.ready.pop(plan, None)
            if output is not None:
                return output
            if plan is not self.leader:
                if not _recomputable():
                    self._learn(plan)
                return plan.compute(x, self.seed)
        return self._lead(plan, x, mark)

    def _learn(self, plan: Fused) -> None:
        assert self.leader is not None
        known = self.followers.setdefault(self.leader, [])
        if plan not in known and self.misses.get(plan, 0) < _MAX_MISSES:
            known.append(plan)

    def _lead(self, plan: Fused, x: Tensor, mark: int) -> Tensor:
        self._drop_unclaimed()
        self.leader, self.source, self.mark = plan, weakref.ref(x), mark
        self.seed = fresh_seed() if plan.dropout else None
        followers = self.followers.get(plan, ())
        for follower in followers:  # expected in this pass, whatever they saw in the last
            self.seen.pop(follower, None)
        if not followers or _recomputable() or not _runs_together(plan, followers):
            return plan.compute(x, self.seed)
        plans = [plan, *followers]
        weights, biases, As, Bs, scales = zip(*(p.pieces() for p in plans), strict=True)
        outputs = kernels.lora_linear_group(
            x, weights, biases, As, Bs, scales, dropout=plan.dropout, seed=self.seed
        )
        self.ready = dict(zip(plans[1:], outputs[1:], strict=True))
        return outputs[0]

    def _drop_unclaimed(self) -> None:
        """Outputs nobody asked for: those siblings did not read the leader's input this time."""
        for plan in self.ready:
            self.misses[plan] = self.misses.get(plan, 0) + 1
            if self.leader is not None:
                self.followers[self.leader].remove(plan)
        self.ready = {}


def _nothing() -> None:
    return None


_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def _recomputable() -> bool:
    """Is this pass one that gradient checkpointing repeats, or a repetition?

    A repeated pass must save the same tensors in the same order, so neither may depend on what was
    learned between them. Checkpointing shows by its hooks on saved tensors; a torch that cannot
    tell of them (before 2.7) groups only where no gradient is asked for.
    """
    if _top_hooks is None:
        return torch.is_grad_enabled()
    return _top_hooks(True) is not None


def _runs_together(plan: Fused, followers: Iterable[Fused]) -> bool:
    """Same dropout, and weights that are whole now (FSDP2 may shard each linear on its own)."""
    return all(
        p.dropout == plan.dropout and type(p.module.weight) is nn.Parameter for p in followers
    )


def link_siblings(plans: Iterable[Fused]) -> None:
    """Give fused plans on linears of one parent and one input width a common `Siblings`."""
    families: dict[tuple[str, int], list[Fused]] = {}
    for plan in plans:
        key = (plan.site.path.rpartition(".")[0], plan.site.in_features)
        families.setdefault(key, []).append(plan)
    for family in families.values():
        common = Siblings() if len(family) > 1 else None
        for plan in family:
            plan.siblings = common
