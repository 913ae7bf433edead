"""MoSA: a residual adapter that is cut into sparse experts to train, and whole again after it.

    x ──┬──► sublayer ───────────────────────────────────────────────────────────► + ──► y
        └──► norm ──► D (r x d) ──► gelu ──► U (d x r) ──► * scale ──────────────────┘
                                       U = U_0 + ... + U_{E-1}, no two with an entry in common

In every step each site draws one expert of each cut projection; only its entries are seen (the
others stand at their start) and only they move. Evaluation, and everything after training, uses all
of them: the merge is a matter of reading, and the adapter is a plain one of the same size. Rule
`mosa` draws (from the run's seed, so that processes and resumed runs agree) and adds the paper's
consistency loss: the batch runs a second time with another draw, and kl times the symmetric KL
divergence of the two answers is added, at the price of a second pass; that draw's entries move too.
A loop without rules trains all experts together. U and the biases start at 0 (the base model), D as
nn.Linear does. Departures: the biases and the norm are one for all experts, where the released code
gives each expert its own and averages; experts never share entries that differ, so its "add" and
"joint" merges are the same. Left out, being no more than a sketch in the paper: experts at several
granularities, and the penalty on hidden states. DistributedDataParallel must look for unused
parameters. Not linear: no fusing, no LoRA export.
Paper: Zhang et al., 2023, arXiv 2312.02923. Parameters: 2 r d + r + d, and 2 d for the norm.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from plait.adapter import Method, Rule, Run, per_site
from plait.adapter.seeds import generator
from plait.errors import PlaitError
from plait.methods._blocks import FEED_FORWARD
from plait.rules._base_weights import refuse_several_processes
from plait.rules._passes import Passes, symmetric_kl
from plait.rules._sparse_experts import MosaDelta, MosaOptions, mosa_count


@dataclass
class Mosa(Rule):
    kl: float = 1.0
    """Weight of the consistency loss (paper: 1); 0 saves the second pass."""

    def check(self, run: Run) -> None:
        super().check(run)
        if self.kl < 0:
            raise PlaitError(f"rule Mosa: kl must be at least 0, not {self.kl}.")
        if not run.deltas(MosaDelta):
            raise PlaitError("rule Mosa draws the experts of method mosa; attach that.")
        if self.kl and any(
            getattr(m, "gradient_checkpointing", False) for m in run.model.modules()
        ):
            raise PlaitError(
                "rule Mosa: with gradient checkpointing a block runs again in backward, when the "
                "second pass has drawn other experts; use `rules: [{mosa: {kl: 0}}]`, or no "
                "checkpointing."
            )

        if self.kl:
            why = "runs other experts in its second pass than in the first (`kl: 0` leaves it out)"
            refuse_several_processes("Mosa", why)

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._deltas = list(run.deltas(MosaDelta).values())
        self._passes = Passes(run.model) if self.kl else None
        self._draw("first")

    def _draw(self, which: str) -> None:
        """Experts for this step: a function of seed and step, with no state to keep."""
        g = generator(self.run.seed, "mosa", which, str(self.run.step))
        for delta in self._deltas:
            delta.draw(g)

    def extra_loss(self) -> Tensor | None:
        if self._passes is None or (first := self._passes.take()) is None:
            return None
        self._draw("second")
        try:
            second = self._passes.again(first)
        finally:
            self._draw("first")  # for this step's next micro-batch
        return self.kl * symmetric_kl(first.predictions(), first.predictions(second))

    def after_step(self) -> None:
        self._draw("first")

    def finish(self) -> None:
        for delta in self._deltas:
            delta.active = {}
        if self._passes is not None:
            self._passes.close()

    def load_state_dict(self, state: dict[str, object]) -> None:
        super().load_state_dict(state)
        self._draw("first")  # the step is another one now


METHOD = Method(
    name="mosa",
    title="MoSA: mixture of sparse adapters, split to train and merged after",
    paper="Zhang et al., 2023, arXiv 2312.02923",
    axis="parameterisation",
    options=MosaOptions,
    delta=MosaDelta,
    rule=Mosa,
    count=per_site(mosa_count),
    targets=FEED_FORWARD,
    example={"rank": 6, "experts": 3},
)
