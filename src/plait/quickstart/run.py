"""`plait quickstart`: three adapters on SmolLM2-135M, their merge, an export, and one HTML report.

English and German home commands (sentence -> JSON call) and a reasoning skill; every test sentence
comes from a template that training never saw. Interrupt it when you like: the same command goes on.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from plait.errors import PlaitError
from plait.quickstart.plots import MERGED
from plait.quickstart.stages import Facts, Stages


@dataclass(frozen=True)
class Training:
    """What one adapter gets; chosen so that all three fit in minutes on two cores."""

    steps: int
    lr: float = 2e-3
    batch_size: int = 8
    rank: int = 8


@dataclass(frozen=True)
class Quickstart:
    """The settings of the job."""

    output: Path = Path("runs/quickstart")
    base: str = "smollm2-135m"
    dtype: str = "fastest"
    """Of the base weights; "fastest" is bfloat16 where this machine multiplies it natively."""
    seed: int = 0
    test_rows: int = 50
    """Held-out rows asked per task."""
    merge_rank: int = 16
    trainings: Mapping[str, Training] = field(default_factory=lambda: dict(TRAININGS))


TRAININGS: dict[str, Training] = {
    "home_en": Training(steps=60),
    "home_de": Training(steps=60),
    "reasoning": Training(steps=40),
}


def main(
    output: str | Path = "runs/quickstart",
    *,
    say: Callable[[str], None] = print,
    **settings: Any,
) -> Path:
    """Run (or finish) the quickstart and return the path of its report."""
    _require_demo()
    job = Quickstart(output=Path(output), **settings)
    if job.dtype == "fastest":
        job = dataclasses.replace(job, dtype=fastest_dtype())
    stages = Stages(job.output / "results", say)
    return _Run(job, stages, say).all()


def fastest_dtype() -> str:
    """bfloat16 on a GPU or a CPU with bfloat16 products, else float32."""
    import torch

    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bfloat16" if torch.cuda.is_available() or native() else "float32"


def _require_demo() -> None:
    for package, module in (
        ("home-assistant-intents", "home_assistant_intents"),
        ("hassil", "hassil"),
        ("reasoning-gym", "reasoning_gym"),
        ("matplotlib", "matplotlib"),
    ):
        if find_spec(module) is None:
            raise PlaitError(
                f"the quickstart needs {package}; install the extra: pip install 'plait[demo]'."
            )


class _Run:
    """The job under way. The base model is loaded when a stage first needs it."""

    def __init__(self, job: Quickstart, stages: Stages, say: Callable[[str], None]) -> None:
        from plait.quickstart.tasks import TASKS

        self.job, self.stages, self.say = job, stages, say
        self.tasks = {name: TASKS[name] for name in job.trainings}
        self._loaded: tuple[Any, Any] | None = None

    def all(self) -> Path:
        from plait.quickstart.report import write_report

        facts: Facts = {"machine": machine_facts(), "job": _plain(self.job)}
        facts["data"] = self._each("data", self.data, self.tasks)
        facts["train"] = self._each("train", self.train, self.tasks)
        facts["merge"] = self._stage("merge", self.merge)
        facts["scores"] = self._each("evaluate", self.evaluate, self.tasks)
        facts["inspect"] = self._each("inspect", self.inspect, self.labels())
        facts["peft"] = self._stage("export-peft", self.check_peft)
        report = write_report(self.job.output, facts)
        self.say(summary(facts))
        self.say(f"report: {report}")
        return report

    def _each(self, stage: str, work: Callable[[str], Facts], names: Iterable[str]) -> Facts:
        return {name: self._stage(f"{stage}-{name}", partial(work, name)) for name in names}

    def _stage(self, name: str, work: Callable[[], Facts]) -> Facts:
        settings = {k: v for k, v in _plain(self.job).items() if k != "output"}
        return self.stages.run(name, settings, work)

    def labels(self) -> list[str]:
        return [*self.tasks, MERGED]

    def folder(self, name: str) -> Path:
        return self.job.output / "adapters" / name

    # -- stages ---------------------------------------------------------------------------------

    def data(self, name: str) -> Facts:
        task = self.tasks[name]
        train, test = task.make(self.job.output / "data" / name, self.job.seed)
        count = {"train": _lines(train), "test": _lines(test)}
        return {"train": str(train), "test": str(test), "rows": count, "title": task.title}

    def train(self, name: str) -> Facts:
        from plait.training.recipe import Recipe
        from plait.training.trainer import train

        plan = self.job.trainings[name]
        recipe = Recipe.make(
            {
                "base": self.job.base,
                "dtype": self.job.dtype,
                "method": "lora",
                "options": {"rank": plan.rank, "alpha": 2 * plan.rank},
                "name": name,
                "data": str(self.job.output / "data" / name / "train.jsonl"),
                "steps": plan.steps,
                "lr": plan.lr,
                "batch_size": plan.batch_size,
                "max_length": 256,
                "show_examples": 0,
                "save_every": max(plan.steps // 5, 1),
                "log_every": 2,
                "seed": self.job.seed,
                "output": str(self.job.output / "training" / name),
            }
        )
        result = train(recipe)
        assert result.adapter is not None
        result.adapter.save(self.folder(name))
        result.adapter.save(self.job.output / "peft" / name, format="peft")
        return {
            "loss": result.loss,
            "steps": result.steps,
            "tokens": result.tokens,
            "parameters": result.adapter.num_parameters(),
            "history": result.history,
            "parity": str(result.parity) if result.parity else "",
            "parity_passed": result.parity.passed if result.parity else None,
        }

    def merge(self) -> Facts:
        from plait.merging import merge

        sources = [self.folder(name) for name in self.tasks]
        exact = merge(sources, weights=[1.0] * len(sources), name=MERGED)
        cut = merge(sources, weights=[1.0] * len(sources), rank=self.job.merge_rank, name=MERGED)
        cut.save(self.folder(MERGED))
        cut.save(self.job.output / "peft" / MERGED, format="peft")
        return {
            "rank": self.job.merge_rank,
            "exact_rank": max(d.options.rank for d in exact.deltas.values()),
            "dropped_energy": cut.info["merge"]["dropped_energy"],
        }

    def evaluate(self, name: str) -> Facts:
        from plait.evaluation import evaluate

        model, tokenizer = self.base()
        task = self.tasks[name]
        result = evaluate(
            model,
            tokenizer,
            self.job.output / "data" / name / "test.jsonl",
            metrics=(),
            scorer=task.score,
            adapters=["base", name, MERGED],
            batch_size=50,
            max_new_tokens=task.max_new_tokens,
            limit=self.job.test_rows,
            progress=True,
        )
        from plait.evaluation.question import read_questions

        asked = read_questions(self.job.output / "data" / name / "test.jsonl")[: self.job.test_rows]
        return {
            "metric": task.metric,
            "examples": result.examples,
            "scores": {r.label: dataclasses.asdict(r.scores["score"]) for r in result.results},
            "samples": _samples(asked, result),
        }

    def inspect(self, name: str) -> Facts:
        from plait.adapter.formats import read_adapter
        from plait.evaluation import inspect_adapter

        report = inspect_adapter(read_adapter(self.folder(name)))
        sites = [
            {"layer": s.layer, "module": s.module, "norm": s.norm, "rank": s.effective_rank}
            for s in report.sites
        ]
        return {"norm": report.norm, "problems": report.problems(), "sites": sites}

    def check_peft(self) -> Facts:
        """Load every export with PEFT, where it is installed, and compare its logits with ours."""
        from plait.quickstart.peft_check import compare_with_peft

        # In float32: in half precision two right answers differ by rounding alone.
        model, tokenizer = self.load("float32")
        rows = self.job.output / "data" / next(iter(self.tasks)) / "test.jsonl"
        folders = {n: self.job.output / "peft" / n for n in self.labels()}
        return compare_with_peft(model, tokenizer, folders, rows)

    def base(self) -> tuple[Any, Any]:
        """The base model with every adapter attached, none active; loaded once."""
        if self._loaded is None:
            self._loaded = self.load(self.job.dtype)
        return self._loaded

    def load(self, dtype: str) -> tuple[Any, Any]:
        import plait
        from plait.training.bases import load_base

        model, tokenizer = load_base(self.job.base, dtype=dtype)
        for name in self.labels():
            plait.load(model, self.folder(name), name=name, activate=False)
        return model, tokenizer


def _samples(asked: Any, result: Any, count: int = 4) -> list[dict[str, str]]:
    return [
        {
            "question": asked[i].example.chat()[-2].content,
            "reference": asked[i].answer,
            **{r.label: r.predictions[i] for r in result.results},
        }
        for i in range(min(count, len(asked)))
    ]


def summary(facts: Facts) -> str:
    """The table of scores as plain text."""
    lines = [f"{'held-out task':<16}{'base':>8}{'its adapter':>14}{'merged':>9}"]
    for name, task in facts["scores"].items():
        base, own, merged = (task["scores"][k]["value"] for k in ("base", name, MERGED))
        lines.append(f"{name:<16}{base:>8.0%}{own:>14.0%}{merged:>9.0%}")
    return "\n".join(lines)


def machine_facts() -> dict[str, str]:
    """Where the figures come from."""
    import os

    packages = ("plait", "torch", "transformers")
    return {
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{p: version(p) for p in packages},
    }


def _plain(job: Quickstart) -> dict[str, Any]:
    return dataclasses.asdict(dataclasses.replace(job, trainings=dict(job.trainings)))


def _lines(path: Path) -> int:
    with path.open(encoding="utf-8") as stream:
        return sum(1 for _ in stream)
