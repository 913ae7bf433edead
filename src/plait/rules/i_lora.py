"""I-LoRA: learning tasks one after another with a fast and a slow memory of the same adapter.

    w  working factors, trained           l <- a l + (1 - a) w,  a = min(1 - 1 / (k + 1), decay)
    l  long-term factors, their average   after every step k; A and B each by itself

    loss = (CE(w; batch) + CE(w; memory)) / 2 + gamma mean(relu(h_l - h_w)^2)

With as many rows as the batch has, drawn from a memory of training rows seen so far (of all of them
with the same probability), w is trained on what came before too, and its hidden states h_w there
are held above the long-term ones, h_l, layer by layer. A first task has nothing to replay: without
`from_step`, replay begins with a run that finds a `memory_file`, which each run leaves for the
next. That run starts both memories from the adapter it is given; the count of steps k goes on.
The halves are exact: the gradient of the batch's own loss is halved where it enters the model (the
loss that a loop shows is not). Departures: h_l is taken without dropout; positions of padding do
not count, nor do the embeddings (whose difference is 0). Costs two more passes a step.
Paper: Ren et al., 2024, arXiv 2402.18865. No parameters; memory for one more copy of the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from plait.adapter import Method, Run, find_blocks
from plait.adapter.choices import check_choices
from plait.adapter.seeds import generator
from plait.errors import PlaitError
from plait.rules._average import AveragingRule, move_average, widened
from plait.rules._base_weights import refuse_several_processes
from plait.rules._block_outputs import block_outputs, shortfall
from plait.rules._forwards import evaluating, unrecorded
from plait.rules._passes import Passes, loss_of
from plait.rules._recent_batches import Batch, batch_of
from plait.rules._reservoir import Reservoir, rows_in


@dataclass
class ILora(AveragingRule):
    decay: float = 0.25
    """Weight of the long-term memory in its average (released code: 0.25, which follows w fast;
    0.9 to 0.999 makes it slow)."""
    gamma: float = 1.0
    """Weight of the hidden states' loss; 0 saves its pass."""
    memory: int = 500
    """Rows remembered, on the CPU."""
    memory_file: str | None = None
    """A safetensors file with the rows of earlier runs, written again at the end."""
    from_step: float | None = None
    """Steps before replay, a share of the run below 1; None: see above."""
    use: Literal["long_term", "working"] = "long_term"
    """What the adapter is at the end (the paper: long_term; released code: working)."""

    def __post_init__(self) -> None:
        check_choices(self, "i-lora")
        if not 0 <= self.decay <= 1 or self.gamma < 0 or self.memory < 1:
            raise PlaitError("i-lora: decay lies in [0, 1], gamma from 0 and memory from 1 up.")

    def check(self, run: Run) -> None:
        super().check(run)
        if self.gamma and not find_blocks(run.model):
            raise PlaitError("i-lora: no transformer blocks to compare; set gamma to 0.")
        refuse_several_processes("ILora", "remembers the rows of its own process")

    def setup(self, run: Run) -> None:
        super().setup(run)
        self._long, self._steps = widened(self._parameters), 0
        self._rows = Reservoir(self.memory, run.seed)
        self._passes = Passes(run.model)
        self._new: list[Batch] = []  # of the step under way
        self._drawn = 0
        self._start = None if self.from_step is None else run.steps(self.from_step)
        if self.memory_file is not None and Path(self.memory_file).is_file():
            self._steps = self._rows.load(Path(self.memory_file)).get("steps", 0)
            self._start = self._start or 0

    def _values(self) -> list[Tensor]:
        return self._long

    def extra_loss(self) -> Tensor | None:
        if (done := self._passes.take()) is None:
            return None
        self._new.append(batch_of(done))
        if self._start is None or self.run.step < self._start or not len(self._rows):
            return None
        own = loss_of(done.output)
        if own.requires_grad:
            own.register_hook(lambda g: g / 2)
        with self._passes.quiet(), unrecorded(self.run.model):
            return self._replay(self._draw(self._new[-1]))

    def _draw(self, like: Batch) -> Batch:
        """As many rows as `like` has; a step's micro-batches share one random order."""
        g = generator(self.run.seed, "i-lora", str(self.run.step))
        order = torch.randperm(len(self._rows), generator=g).tolist()
        count, first = rows_in(like), self._drawn
        self._drawn += count
        chosen = [order[i % len(order)] for i in range(first, first + count)]
        return self._rows.batch(chosen, like, self._parameters[0].device)

    def _replay(self, batch: Batch) -> Tensor:
        model, (args, kwargs) = self.run.model, batch
        if not self.gamma:
            return loss_of(model(*args, **kwargs)) / 2
        with torch.no_grad(), evaluating(model), self.averaged(), block_outputs(model) as slow:
            model(*args, **kwargs)
        with block_outputs(model) as fast:
            loss = loss_of(model(*args, **kwargs)) / 2
        return loss + self.gamma * shortfall(fast, slow, kwargs.get("attention_mask"))

    @torch.no_grad()
    def after_step(self) -> None:
        for batch in self._new:
            self._rows.add(batch)
        self._new, self._drawn = [], 0
        self._steps += 1
        kept = min(1 - 1 / (self._steps + 1), self.decay)
        move_average(self._long, self._parameters, 1 - kept)

    def finish(self) -> None:
        if self.use == "long_term":
            self.take_over()
        self._passes.close()
        if self.memory_file is not None:
            self._rows.save(Path(self.memory_file), steps=self._steps)

    def state_dict(self) -> dict[str, Any]:
        own = {"long": self._named(self._long), "steps": self._steps, "start": self._start}
        return own | self._rows.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._long = self._ordered(state["long"])
        self._steps, self._start = int(state["steps"]), state["start"]
        self._rows.load_state_dict(state)


METHOD = Method(
    name="i-lora",
    title="I-LoRA: replay, and a slow average of the adapter to hold features",
    paper="Ren et al., 2024, arXiv 2402.18865",
    axis="rule",
    rule=ILora,
    rule_example={"from_step": 1, "memory": 6},
)
