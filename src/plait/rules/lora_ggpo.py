"""LoRA-GGPO: gradients taken beside the weights, so that training ends where the loss is flat.

    mgpo    theta + eps:   eps = rho / gbar * m / ||m||           one backward, at theta + eps
    ggpo    W + dW + E:    E_i ~ N(0, sigma_i^2),  sigma_i = (sigma w_i + kappa q_i^2) / sqrt(out)

`mgpo` (the published second version) moves the adapter's tensors theta along the optimiser's first
moment m from the first forward of a step on, and puts them back bit for bit before the update: what
sharpness-aware minimisation does with a second gradient. gbar smooths the norms of the gradients
that the optimiser gets: where they are clipped, of the clipped ones. It starts as the first norm,
and the first step is a plain one. An optimiser without a first moment gets one kept here (`mu`).
As gradients vanish eps grows without bound, so `limit` holds it to a share of ||theta||.
`ggpo` (the first version) adds x E^T to the outputs of linear sites: w_i^2 = n^2 + ||row i of
dW||^2 with n the mean row norm of W, and q_i the norm of row i of s (B g_A + g_B A), from the last
step's gradients (none in the first step). E is one draw a step, made from the run's seed in blocks
of rows and again in backward, never kept; x's gradient sees it, the pair's does not. It costs a
product as large as the site's own and the drawing. Neither version touches what evaluation sees,
nor what is saved. Paper: Chang, Guo, Chang and Wu, 2025, arXiv 2502.14538 (v1 GGPO, v2 on MGPO).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from plait.adapter import Method, Rule, Run
from plait.adapter.choices import check_choices
from plait.errors import PlaitError
from plait.rules._momentum_step import MomentumStep
from plait.rules._perturbed import TrainingForwards
from plait.rules._row_noise import RowNoise


@dataclass
class LoraGgpo(Rule):
    form: Literal["mgpo", "ggpo"] = "mgpo"
    """Along the moment, or random noise on the weights of linear sites."""
    rho: float = 0.05
    """mgpo: ||eps|| at a smoothed gradient norm of 1 (paper: 0.05 for T5, 0.01 for Llama-2-7B)."""
    beta: float = 0.9
    """mgpo: smoothing of gradient norms (paper: 0.9, and 0.8 for Llama-2-7B)."""
    mu: float = 0.9
    """mgpo: smoothing of a first moment that the optimiser does not keep."""
    limit: float | None = 0.1
    """mgpo: largest ||eps|| as a share of ||theta||; None is the paper's, without a limit."""
    sigma: float = 0.03
    """ggpo: noise for every unit of a row's weight norm."""
    kappa: float = 0.01
    """ggpo: noise for every unit of a row's squared gradient norm (the paper's beta)."""

    def __post_init__(self) -> None:
        check_choices(self, "lora-ggpo")
        for name in ("rho", "sigma", "kappa", "limit"):
            if (getattr(self, name) or 0) < 0:
                raise PlaitError(f"lora-ggpo: {name} must be at least 0, not {self!r}.")
        for name in ("beta", "mu"):
            if not 0 <= getattr(self, name) < 1:
                raise PlaitError(f"lora-ggpo: {name} must lie in [0, 1), not {self!r}.")
        self.needs_pairs = self.form == "ggpo"
        self.claims = frozenset({"weights"} if self.form == "mgpo" else ())

    def check(self, run: Run) -> None:
        super().check(run)
        kinds = {pair.delta.site.kind for pair in run.pairs()}
        if self.form == "ggpo" and "linear" not in kinds:
            raise PlaitError(
                "rule LoraGgpo in the form ggpo disturbs linear sites, and the adapter has none; "
                "use form mgpo."
            )

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._moment = MomentumStep(run, self.rho, self.beta, self.mu, self.limit)
        self._noise = RowNoise(run, self.sigma, self.kappa) if self.form == "ggpo" else None
        self._forwards = TrainingForwards(run.model, self._noise or self._moment)

    def before_step(self) -> None:
        self._forwards.end_step()
        if self._noise is not None:
            self._noise.observe()

    def after_step(self) -> None:
        if self._noise is not None:
            self._noise.update()
        else:
            self._moment.observe()

    def finish(self) -> None:
        self._forwards.close()
        if self._noise is not None:
            self._noise.close()

    def state_dict(self) -> dict[str, Any]:
        if self._noise is not None:
            return {"gradients": dict(self._noise.gradients)}
        return {"norm": self._moment.norm, "own": dict(self._moment.own)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._noise is not None:
            self._noise.gradients = dict(state["gradients"])
            self._noise.update()
        else:
            self._moment.norm, self._moment.own = state["norm"], dict(state["own"])


METHOD = Method(
    name="lora-ggpo",
    title="LoRA-GGPO and its successor LoRA-MGPO: training at perturbed weights",
    paper="Chang et al., 2025, arXiv 2502.14538",
    axis="rule",
    rule=LoraGgpo,
)
