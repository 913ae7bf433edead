"""GaLore: full training whose optimiser state lives in a subspace of each weight's gradient.

    G [m, n] ──► R = P^T G  or  G Q^T ──► Adam on R ──► N ──► W -= lr * scale * (P N  or  N Q)
                 P, Q: the leading `rank` singular vectors of G, taken anew every `interval` steps

No adapter: the base weights themselves train (`method: none`). One period changes a weight in rank
`rank` at most, many periods in any. Of the shorter side s and the longer one l are kept s r (the
basis) and 2 l r (moments) instead of 2 s l; in 8 bits a quarter of the latter. Projected are the
linears of the blocks; a side no longer than `rank` needs no basis, and with neither side projected
a weight takes plain AdamW's step at scale * lr. Everything else takes plain AdamW's at lr.
Paper: Zhao et al., 2024, arXiv 2403.03507.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from plait.adapter import Method, Rule, Run, find_blocks, split_group
from plait.adapter.choices import check_choices
from plait.adapter.rule import OptimizerFactory
from plait.adapter.site import make_site
from plait.adapter.targets import base_modules
from plait.errors import PlaitError
from plait.rules._base_weights import base_group, refuse_several_processes, train_base
from plait.rules._galore_inner import Adam, Inner, make_inner
from plait.rules._galore_optimizer import GaLoreOptimizer, OnRefresh, Projection
from plait.rules._subspace import Side, Svd


@dataclass
class Galore(Rule):
    rank: int = 128
    """Dimensions of a subspace (about a quarter of the width; the paper's for 60M to 130M)."""
    interval: int = 200
    """Steps between two subspaces of a weight (500 for 7B)."""
    scale: float = 0.25
    """Factor on projected steps (2 to 4 with small ranks in fine-tuning)."""
    side: Side = "std"
    """What is projected: the shorter side, the longer one, the rows, the columns, or both."""
    inner: Inner = "adamw"
    """The step within the subspace: moments of 32 bits, of 8 bits in blocks of 256, or factored."""
    on_refresh: OnRefresh = "keep"
    """Moments when the subspace changes: as they are (the paper's), anew, or in the new basis."""
    svd: Svd = "randomised"
    """How subspaces are found; "full" is the paper's, about twice as slow."""
    stagger: bool = False
    """Spread the weights' refreshes over the interval (the first step finds all of them)."""
    embeddings: bool = False
    """Project embedding and head too."""
    per_layer: bool = False
    """Move each weight in backward and free its gradient at once: no two gradients ever stand side
    by side. Needs gradient_accumulation 1 (a second backward is refused) on one process. What no
    rule can see: clipping and loss scaling, which come too late here, must be off."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of both AdamW steps."""
    eps: float = 1e-8
    """Of both AdamW steps."""

    needs_adapter = False
    claims = frozenset({"base"})

    def __post_init__(self) -> None:
        check_choices(self, "galore")
        if self.rank < 1 or self.interval < 1:
            given = f"{self.rank} and {self.interval}"
            raise PlaitError(f"galore: rank and interval must be at least 1, not {given}.")

    def check(self, run: Run) -> None:
        if run.adapters:
            raise PlaitError(
                f"rule Galore trains base weights, which adapter {run.adapters[0].name!r} relies "
                "on; use `method: none`."
            )
        if not self._projected(run):
            raise PlaitError("galore: the model has no linear layer to project.")
        if self.per_layer:
            refuse_several_processes("Galore", "with per_layer moves weights before gradients meet")

    def _projected(self, run: Run) -> set[int]:
        """ids of the weights whose gradients are projected."""
        inside = tuple(f"{path}." for path, _ in find_blocks(run.model)) or ""
        found = set()
        for path, module in base_modules(run.model):
            site = make_site(path, module)
            kind = None if site is None else site.kind
            if (kind == "linear" and path.startswith(inside)) or (
                self.embeddings and kind in ("linear", "embedding")
            ):
                found.add(id(module.weight))
        return found

    def setup(self, run: Run) -> None:
        super().setup(run)
        train_base(run.model)
        self._hooks: list[Any] = []
        self._moved: set[int] = set()

    def parameter_groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        chosen = self._projected(self.run)
        low, rest = split_group(base_group(self.run), lambda _, p: id(p) in chosen)
        return [*groups, {**low, "projected": True}, {**rest, "projected": False}]

    def optimizer(self) -> OptimizerFactory:
        return self._make

    def _make(self, groups: list[dict[str, Any]]) -> GaLoreOptimizer:
        how = {f: getattr(self, f) for f in Projection.__dataclass_fields__}
        made = GaLoreOptimizer(
            groups,
            projection=Projection(**how),
            inner=make_inner(self.inner, self.betas, self.eps),
            plain=Adam(self.betas, self.eps),
            seed=self.run.seed,
        )
        if self.per_layer:
            for p in (p for group in made.param_groups for p in group["params"]):
                hook = lambda parameter: self._move_now(made, parameter)  # noqa: E731
                self._hooks.append(p.register_post_accumulate_grad_hook(hook))
        return made

    def _move_now(self, optimizer: GaLoreOptimizer, parameter: nn.Parameter) -> None:
        if id(parameter) in self._moved:
            raise PlaitError(
                "galore: a second backward pass before the step, but per_layer has moved the "
                "weights in the first; use gradient_accumulation 1, or per_layer off."
            )
        self._moved.add(id(parameter))
        optimizer.step_one(parameter)
        parameter.grad = None

    def after_step(self) -> None:
        self._moved.clear()

    def finish(self) -> None:
        for hook in self._hooks:
            hook.remove()


METHOD = Method(
    name="galore",
    title="GaLore: full training with optimiser state in a subspace of the gradients",
    paper="Zhao et al., 2024, arXiv 2403.03507",
    axis="rule",
    rule=Galore,
    rule_example={"rank": 3, "interval": 4, "scale": 1.0},
)
