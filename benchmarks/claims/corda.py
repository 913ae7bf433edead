"""CorDA learns faster than LoRA from the new data's directions, or forgets less with the old's."""

import itertools
import statistics

import torch
from lab import Claim, Contender, Verdict, compare, main
from lab.tasks import TASKS, Batch
from lab.verdict import CONTRADICTED, NOT_SHOWN, SHOWN, all_of, interval
from torch import nn
from torch.nn import functional as F

import plait
from plait.initializers.corda import Corda

TASK = TASKS["digits-vit"]
SEEDS = (0, 1, 2, 3, 4)
STARTS = {"lora": None, "pissa": "pissa", "kpm": Corda(mode="kpm")}


def upright(data: Batch) -> Batch:
    """The pictures as the base learned to read them."""
    return {"pixels": torch.rot90(-data["pixels"], -1, (1, 2)), "labels": data["labels"]}


def forgotten(start, seed: int, steps: int) -> float:
    """How much the loss on upright pictures has grown after adapting to the turned ones."""
    model, data = TASK.fresh(), TASK.splits()
    old = [upright({k: v[:128] for k, v in data["train"].items()})]
    before = loss(model, upright(data["test"]))
    plait.attach(
        model, "lora", targets=TASK.targets, rank=4, alpha=4, initializer=start, data=old, seed=seed
    )
    run = plait.RuleStack(model, lr=3e-3, total_steps=steps, seed=seed)
    for batch in itertools.islice(TASK.batches(seed), steps):
        model(**batch).loss.backward()
        run.step()
    return loss(model, upright(data["test"])) - before


def loss(model: nn.Module, data: Batch) -> float:
    with torch.no_grad():
        return F.cross_entropy(model.eval()(data["pixels"]).logits, data["labels"]).item()


def forgetting(smoke):
    steps, seeds = (5, SEEDS[:2]) if smoke else (100, SEEDS)
    return {name: [forgotten(s, seed, steps) for seed in seeds] for name, s in STARTS.items()}


def forgets_less(found, other: str) -> Verdict:
    grown = found["measured"]
    gain, half = interval([b - a for a, b in zip(grown["kpm"], grown[other], strict=True)])
    outcome = SHOWN if gain > half else CONTRADICTED if gain < -half else NOT_SHOWN
    means = {name: statistics.fmean(grown[name]) for name in ("kpm", other)}
    text = f"{means['kpm']:.3g} for kpm, {means[other]:.3g} for {other}"
    return Verdict(outcome, f"old loss grows by {text} (gain {gain:+.3g} ± {half:.2g}).")


CLAIM = Claim(
    slug="corda",
    paper="Yang et al., 2024, arXiv 2406.05223",
    statement="CorDA reaches a lower loss than LoRA in its instruction mode, and in its knowledge "
    "mode forgets less than LoRA and PiSSA",
    task="digits-vit",
    contenders=(
        Contender("lora", "lora", {"rank": 4, "alpha": 4}),
        Contender("corda", "lora", {"rank": 4, "alpha": 4}, initializer="corda"),
    ),
    judge=lambda found: all_of(
        compare(found, "corda", "lora"), forgets_less(found, "lora"), forgets_less(found, "pissa")
    ),
    measure=forgetting,
    note="Forgetting: 100 steps at 3e-3; kpm is calibrated on 128 upright pictures.",
)

if __name__ == "__main__":
    main(CLAIM)
