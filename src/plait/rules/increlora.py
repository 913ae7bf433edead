"""IncreLoRA: start at rank 1 and add rank where it matters.

    dW = scaling * B diag(e, g .. g) A        e: gates of the active components, trained from 0
                                              g: 1e-5 for the reserve, fixed ("advance learning")

Every site starts with `rank` active components and a reserve whose A and B already train behind a
tiny gate. At intervals the sites of highest score turn their reserve active and get a new one,
until the average rank is `target_rank`. The score of a site at one step is sum |dW * dL/d(dW)| /
sqrt(out in), smoothed, times its smoothed deviation. dW and its gradient are formed on score steps
only, by hooks on the site; training itself rides the factors.
Departures: the scaling stays alpha / (initial rank) when a site grows (`rescale` gives the paper's
alpha / (current rank), which moves the whole dW at each growth); the regulariser makes all of a
site's components mutually orthogonal, where the paper's code treats each part by itself; the B of a
reserve starts at 0, not N(0, std), so that neither the start nor a new reserve moves dW at all.
Paper: Zhang et al., 2023, arXiv 2308.12043. Parameters: (rank + reserve)(in + out) + rank a site.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from plait.adapter import (
    Method,
    Pair,
    PairDelta,
    PairOptions,
    Rule,
    Run,
    Site,
    Traits,
    per_site,
    replace_parameter,
)
from plait.errors import PlaitError
from plait.linalg import LowRank
from plait.rules._base_weights import refuse_several_processes


@dataclass(frozen=True)
class IncreloraOptions(PairOptions):
    rank: int = 1
    """Active components at the start."""
    reserve: int = 4
    """Components trained in advance, and how many a growing site gains (paper: target rank / 2)."""
    gate: float = 1e-5
    """Gate of the reserve; 0 leaves it untrained until it is chosen."""
    std: float = 0.02
    """Standard deviation of new rows of A and columns of B."""
    rescale: bool = False
    """Divide by the current rank, as the paper does, instead of the initial one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or self.reserve < 0:
            raise PlaitError("increlora: rank must be at least 1 and reserve at least 0.")


class IncreloraDelta(PairDelta):
    kinds = frozenset({"linear", "conv"})
    traits = Traits(low_rank=True)
    options: IncreloraOptions
    e: Tensor

    def build(self) -> None:
        width = self.options.rank + self.options.reserve
        self.parameter("A", width, self.site.in_features)
        self.parameter("B", self.site.out_features, width)
        self.parameter("e", self.options.rank)

    def reset(self) -> None:
        with torch.no_grad():
            for name in ("A", "B"):
                self.start(name, "normal")
                self.get_parameter(name).mul_(self.options.std)
            if self.options.gate:
                self.B[:, self.rank :] = 0.0

    @property
    def rank(self) -> int:
        return self.e.shape[0]

    @property
    def reserve(self) -> int:
        return self.A.shape[0] - self.e.shape[0]

    def gates(self) -> Tensor:
        return torch.cat([self.e, self.e.new_full((self.reserve,), self.options.gate)])

    def trained(self) -> LowRank:
        return LowRank(B=self.B, A=self.gates()[:, None] * self.A, scale=self.scaling)

    def pairs(self) -> list[Pair]:
        return []  # gated: dW is no longer scaling * B A, which is what rules over pairs assume

    def grow(self, extra: int, optimizer: Any = None) -> None:
        """Turn `extra` components of the reserve active and refill it; dW hardly moves."""
        if extra > self.reserve:
            raise PlaitError(
                f"increlora: {self.site.path!r} has {self.reserve} in reserve, not {extra}."
            )
        kept = torch.arange(self.rank + self.reserve)
        gates = self.e.new_full((extra,), self.options.gate)
        self._replace(kept, extra, torch.arange(self.rank), gates, optimizer)

    def keep(self, components: Sequence[int] | Tensor, optimizer: Any = None) -> None:
        """Keep only these active components, and the reserve."""
        active = torch.as_tensor(components, dtype=torch.long)
        kept = torch.cat([active, torch.arange(self.rank, self.rank + self.reserve)])
        self._replace(kept, 0, active, self.e.new_zeros(0), optimizer)

    def drop_reserve(self, optimizer: Any = None) -> None:
        """End of growth: only the active components are left."""
        active = torch.arange(self.rank)
        self._replace(active, 0, active, self.e.new_zeros(0), optimizer)

    def _replace(
        self, kept: Tensor, fresh: int, gates_kept: Tensor, gates: Tensor, optimizer: Any
    ) -> None:
        scaling, rescale = self.scaling, self.options.rescale
        for name, axis in (("A", 0), ("B", 1)):
            replace_parameter(self, name, kept, axis, self._fresh(name, axis, fresh), optimizer)
        replace_parameter(self, "e", gates_kept, 0, gates, optimizer)
        root = math.sqrt if self.options.rslora else float
        # alpha follows the rank unless rescaling is wanted: the scaling, and dW, stay as they were.
        alpha = scaling * root(self.options.rank if rescale else self.rank)
        self.options = dataclasses.replace(
            self.options, rank=self.rank, reserve=self.reserve, alpha=alpha
        )

    def _fresh(self, name: str, axis: int, count: int) -> Tensor:
        old = self.get_parameter(name)
        shape = list(old.shape)
        shape[axis] = count
        # Behind a shut gate B must be random: with B and e both 0 a component could never move.
        if name == "B" and self.options.gate:
            return old.new_zeros(shape)
        # Named by the width, so that a resumed run draws what the uninterrupted one would have.
        g = self.generator("grow", name, str(old.shape[axis]))
        return (torch.empty(shape).normal_(generator=g) * self.options.std).to(old)

    def described_options(self) -> dict[str, Any]:
        return dataclasses.asdict(self.options)


@dataclass
class Increlora(Rule):
    target_rank: float = 8.0
    """Average active rank over sites at the end (the paper: 2 to 8)."""
    top_h: int | None = None
    """Sites that grow at a time; None is the paper's 5, or more where growth would end too late."""
    warmup: float = 0.1
    """Steps before the first growth; a share of the run below 1 (the paper: 100 to 1000 steps)."""
    interval: int | None = None
    """Steps between growths (the paper: 20 to 100); None spreads them until `finish_by`."""
    finish_by: float = 0.7
    """When growth should have ended; a share of the run below 1."""
    score_every: int = 1
    """Score on every n-th step while growing: each costs dW and its gradient at every site."""
    beta1: float = 0.85
    """Smoothing of the score."""
    beta2: float = 0.85
    """Smoothing of its deviation."""
    orthogonal: float = 0.1
    """Weight of the mean over sites of ||A A^T - I|| + ||B^T B - I||; the paper has 0.1 to 0.5."""

    resizes = True

    def check(self, run: Run) -> None:
        super().check(run)
        for name, delta in _every_delta(run):
            if not isinstance(delta, IncreloraDelta):
                raise PlaitError(
                    f"rule Increlora grows gated components, which {name!r} has not; "
                    "use method increlora."
                )
        deltas = dict(_growing(run))
        # A resumed adapter that has reached its budget has no reserve any more, and needs none.
        if sum(d.rank for d in deltas.values()) < round(self.target_rank * len(deltas)):
            for name, delta in deltas.items():
                if delta.reserve == 0:
                    raise PlaitError(
                        f"increlora: {name!r} has no reserve to grow from; set reserve."
                    )
        refuse_several_processes("Increlora", "changes the shapes of parameters")
        self._plan(run)

    def _plan(self, run: Run) -> None:
        """Sites a growth and steps between growths, so that the last comes by `finish_by`."""
        deltas = [d for _, d in _growing(run)]
        self._target = round(self.target_rank * len(deltas))
        missing = self._target - sum(d.rank for d in deltas)
        growths = math.ceil(missing / max(1, deltas[0].options.reserve))
        self._start = run.steps(self.warmup)
        self._every, self._sites = self.interval or 20, self.top_h or 5
        if run.total_steps is None and (self.finish_by < 1 or self.interval):
            return
        room = max(0, run.steps(self.finish_by) - self._start)
        if self.top_h is None:
            rounds = max(1, room // self.interval if self.interval else room)
            self._sites = min(len(deltas), max(5, math.ceil(growths / rounds)))
        rounds = math.ceil(growths / self._sites)
        if self.interval is None and rounds > 0:
            self._every = max(1, room // rounds)
        if run.step == 0 and (rounds - 1) * self._every > room:
            raise PlaitError(
                f"increlora: {rounds} growths every {self._every} steps do not end by step "
                f"{self._start + room}; raise top_h or the steps, or lower interval or target_rank."
            )

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._plan(run)
        self._mean: dict[str, float] = {}
        self._deviation: dict[str, float] = {}
        self._gradients: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._done = False
        self._watch()

    # -- scores -----------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Hook the sites when the coming step is to be scored, and unhook them otherwise."""
        wanted = not self._done and (self.run.step + 1) % self.score_every == 0
        if wanted == bool(self._handles):
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if wanted:
            for name, delta in _growing(self.run):
                hook = gradient_hook(delta.site, partial(self._collect, name))
                self._handles.append(delta.site.base.register_forward_hook(hook))

    def _collect(self, name: str, gradient: Tensor) -> None:
        seen = self._gradients.get(name)
        self._gradients[name] = gradient if seen is None else seen + gradient

    @torch.no_grad()
    def before_step(self) -> None:
        for name, delta in _growing(self.run) if self._gradients else ():
            if name in self._gradients:
                self._smooth(name, float(sensitivity(delta.dense(), self._gradients.pop(name))))
        self._gradients = {}

    def _smooth(self, name: str, score: float) -> None:
        mean = self._mean[name] = self.beta1 * self._mean.get(name, 0.0) + (1 - self.beta1) * score
        old = self._deviation.get(name, 0.0)
        self._deviation[name] = self.beta2 * old + (1 - self.beta2) * abs(score - mean)

    def scores(self) -> dict[str, float]:
        """Smoothed importance times smoothed deviation, by "adapter/site path"."""
        return {name: self._mean[name] * self._deviation[name] for name in self._mean}

    # -- growth -----------------------------------------------------------------------------------

    def after_step(self) -> None:
        due = self.run.step - self._start
        if not self._done and due >= 0 and due % self._every == 0:
            self._grow()
        self._watch()

    def _grow(self) -> None:
        deltas = dict(_growing(self.run))
        missing = self._target - sum(d.rank for d in deltas.values())
        scores = self.scores()
        # Names break ties, so that equal scores (all zero at first) cannot depend on hash order.
        ranked = sorted(deltas, key=lambda name: (-scores.get(name, 0.0), name))
        for name in ranked[: self._sites]:
            extra = min(deltas[name].reserve, missing)
            if extra > 0:
                deltas[name].grow(extra, self.run.optimizer)
                missing -= extra
        if missing <= 0:
            self._end()

    def _end(self) -> None:
        self._done = True
        for _, delta in _growing(self.run):
            if delta.reserve:
                delta.drop_reserve(self.run.optimizer)

    def finish(self) -> None:
        self._end()
        self._watch()

    def extra_loss(self) -> Tensor | None:
        if not self.orthogonal:
            return None
        deltas = [d for _, d in _growing(self.run)]
        grams = [gram for d in deltas for gram in (d.A, d.B.mT)]
        return self.orthogonal * orthogonality(grams) / len(deltas)

    def state_dict(self) -> dict[str, Any]:
        plan = [self._target, self._start, self._every, self._sites]
        return {
            "mean": dict(self._mean),
            "deviation": dict(self._deviation),
            "done": self._done,
            "plan": plan,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._mean, self._deviation = dict(state["mean"]), dict(state["deviation"])
        self._done = bool(state["done"])
        # The plan was made from the ranks at the start, which a resumed adapter no longer has.
        self._target, self._start, self._every, self._sites = state["plan"]
        self._watch()


def _every_delta(run: Run) -> Iterator[tuple[str, Any]]:
    for adapter in run.adapters:
        for path, delta in adapter.deltas.items():
            yield f"{adapter.name}/{path}", delta


def _growing(run: Run) -> Iterator[tuple[str, IncreloraDelta]]:
    yield from _every_delta(run)


def gradient_hook(site: Site, collect: Callable[[Tensor], None]) -> Callable[..., None]:
    """A forward hook that hands dL/d(dW) [out, in] of each backward pass to `collect`."""

    def hook(module: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            x = inputs[0].detach()
            output.register_hook(lambda g: collect(weight_gradient(site, x, g)))

    return hook


def weight_gradient(site: Site, x: Tensor, g: Tensor) -> Tensor:
    """dL/dW in canonical orientation, float32 or wider, from a site's input and output gradient."""
    wide = torch.promote_types(g.dtype, torch.float32)
    if site.kind == "linear":
        return (g.flatten(0, -2).mT @ x.flatten(0, -2).to(g.dtype)).to(wide)
    with torch.enable_grad():
        weight = torch.zeros(site.shape, dtype=g.dtype, device=g.device, requires_grad=True)
        (gradient,) = torch.autograd.grad(site.apply(x.to(g.dtype), weight), weight, g)
    return gradient.to(wide)


def sensitivity(change: Tensor, gradient: Tensor) -> Tensor:
    """sum |dW * dL/d(dW)| / sqrt(out in)."""
    return (change * gradient).abs().sum() / math.sqrt(max(1, change.numel()))


def orthogonality(rows: Sequence[Tensor]) -> Tensor:
    """Sum over matrices [r, n] of ||M M^T - I||_F, equal shapes in one batch."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for matrix in rows:
        by_shape.setdefault(matrix.shape, []).append(matrix)
    total = []
    for (r, _), group in by_shape.items():
        stack = torch.stack(group)
        eye = torch.eye(r, dtype=stack.dtype, device=stack.device)
        total.append(torch.linalg.matrix_norm(stack @ stack.mT - eye).sum())
    return torch.stack(total).sum()


def _count(site: Site, o: IncreloraOptions) -> int:
    return (o.rank + o.reserve) * (site.in_features + site.out_features) + o.rank


METHOD = Method(
    name="increlora",
    title="IncreLoRA: rank added where it matters during training",
    paper="Zhang et al., 2023, arXiv 2308.12043",
    axis="parameterisation",
    options=IncreloraOptions,
    delta=IncreloraDelta,
    rule=Increlora,
    count=per_site(_count),
)
