"""An optimiser whose state of chosen weights lives in a low-rank subspace of their gradients.

    G ──► project ──► R ──► inner step ──► N ──► back ──► W -= lr (scale * back + decay W)

It takes groups as any optimiser does: those with `projected=True` go through the subspace, which
is the leading singular vectors of the gradient at hand, taken anew every `interval` steps of a
weight; the others take a plain Adam step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plait.adapter.seeds import generator
from plait.errors import PlaitError
from plait.linalg.precision import working_dtype
from plait.rules._galore_inner import Adam, InnerStep
from plait.rules._subspace import Side, Subspace, Svd, leading_subspace

OnRefresh = Literal["keep", "zero", "rotate"]


@dataclass(frozen=True)
class Projection:
    """How gradients are projected."""

    rank: int = 128
    interval: int = 200
    scale: float = 0.25
    side: Side = "std"
    on_refresh: OnRefresh = "keep"
    svd: Svd = "randomised"
    stagger: bool = False


class GaLoreOptimizer(torch.optim.Optimizer):
    """See the module.

    Args:
        params: parameters, or groups that may hold `projected` (default False) and `names`.
        inner, plain: the steps of projected and of other gradients.
        seed: of the sketches, which depend on nothing else than a weight's name and its step.

    What it keeps of a parameter: `step`; the bases `left` and `right`, where there are; and under
    `inner` the state of its inner step. `load_state_dict` takes tensors as they were saved, so that
    8-bit codes stay codes and the moments of half-precision weights stay float32.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        projection: Projection | None = None,
        inner: InnerStep | None = None,
        plain: InnerStep | None = None,
        seed: int = 0,
    ) -> None:
        self.projection = projection or Projection()
        self.inner, self.plain = inner or Adam(), plain or Adam()
        self.seed = seed
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "projected": False})
        self._group: dict[nn.Parameter, int] = {}
        self._names: dict[nn.Parameter, str] = {}
        for index, group in enumerate(self.param_groups):
            self._group.update(dict.fromkeys(group["params"], index))
            names = group.get("names") or [f"{index}/{i}" for i in range(len(group["params"]))]
            self._names.update(zip(group["params"], names, strict=True))
        projected = [p for g in self.param_groups if g["projected"] for p in g["params"]]
        turns, count = self.projection.interval, max(1, len(projected))
        self._offsets = {p: i * turns // count for i, p in enumerate(projected)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    @torch.no_grad()
    def step_one(self, parameter: nn.Parameter) -> None:
        """The step of one parameter alone, as soon as its gradient is there."""
        self._move(parameter, self.param_groups[self._group[parameter]])

    def _move(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state, gradient = self.state[parameter], parameter.grad
        gradient = gradient.to(working_dtype(gradient.dtype))
        state.setdefault("step", 0)
        if group["projected"]:
            if self._due(parameter, state["step"]):
                self._refresh(parameter, gradient)
            space = _space(state)
            reduced = self.inner.direction(state["inner"], space.project(gradient))
            direction = self.projection.scale * space.back(reduced)
        else:
            direction = self.plain.direction(state.setdefault("inner", {}), gradient)
        state["step"] += 1
        # Decay first, as torch.optim.AdamW has it; the paper's code decays what has moved.
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction.to(parameter.dtype), alpha=-group["lr"])

    # -- subspaces ------------------------------------------------------------------------------

    def _due(self, parameter: nn.Parameter, step: int) -> bool:
        offset = self._offsets[parameter] if self.projection.stagger else 0
        return step == 0 or (step + offset) % self.projection.interval == 0

    def _refresh(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        state, how, name = self.state[parameter], self.projection, self._names[parameter]
        draw = generator(self.seed, "galore", name, str(state["step"]))
        try:
            new = leading_subspace(gradient, how.rank, how.side, how.svd, draw)
        except ValueError as e:
            raise PlaitError(
                f"galore: no subspace of the gradient of {name!r} at step {state['step']} ({e}); "
                "is the learning rate too high?"
            ) from e
        bases = {k: t for k, t in vars(new).items() if t is not None}
        if "inner" not in state or (bases and how.on_refresh == "zero"):
            state["inner"] = {}
        elif bases and how.on_refresh == "rotate":
            self.inner.turn(state["inner"], new.turn_from(_space(state)))
        state.update(bases)

    # -- state ------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # The base class would bring every tensor to its parameter's dtype.
        super().load_state_dict({**state_dict, "state": {}})
        saved = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        mine = chain.from_iterable(g["params"] for g in self.param_groups)
        for key, parameter in zip(saved, mine, strict=True):
            if key in state_dict["state"]:
                self.state[parameter] = _copied(state_dict["state"][key], parameter.device)

    def state_bytes(self, parameters: Iterable[nn.Parameter] | None = None) -> int:
        """Bytes of all tensors kept for these parameters (all by default), bases included."""
        chosen = self.state if parameters is None else parameters
        return sum(t.nbytes for p in chosen for t in _tensors(self.state.get(p, {})))


def _space(state: dict[str, Any]) -> Subspace:
    return Subspace(state.get("left"), state.get("right"))


def _copied(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {k: _copied(v, device) for k, v in value.items()}
    return value.to(device, copy=True) if isinstance(value, Tensor) else value


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, dict):
        return chain.from_iterable(_tensors(v) for v in value.values())
    return [value] if isinstance(value, Tensor) else []
