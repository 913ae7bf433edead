"""Comp-LoRA learns the new classes as LoRA does, and forgets less of the others."""

import itertools
import statistics

import torch
from lab import Claim, main
from lab.tasks import TASKS
from lab.verdict import CONTRADICTED, NOT_SHOWN, SHOWN, Verdict, interval

import plait

NEW, RATES, SEEDS, STEPS = (0, 1, 2), (1e-3, 3e-3, 1e-2, 3e-2), (0, 1, 2, 3, 4), 100
SIDES = {
    "comp-lora": ("comp-lora", {"rank": 4, "alpha": 4, "energy": 0.9}),
    "lora": ("lora", {"rank": 4, "alpha": 4}),
}


def rows_of(split: str, classes) -> dict:
    """The turned digits of some classes."""
    data = TASKS["digits-few"].splits()[split]
    chosen = torch.isin(data["labels"], torch.tensor(classes))
    return {name: tensor[chosen] for name, tensor in data.items()}


def accuracy(model, data: dict) -> float:
    model.eval()
    with torch.no_grad():
        return (model(**data).logits.argmax(-1) == data["labels"]).double().mean().item()


def trained(method: str, options: dict, rate: float, seed: int, steps: int):
    """The base after some steps on six turned digits of each new class."""
    task = TASKS["digits-few"]
    model, data = task.fresh(), rows_of("train", NEW)
    torch.manual_seed(seed)
    plait.attach(model, method, targets=task.targets, seed=seed, **options)
    run = plait.RuleStack(model, lr=rate)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(data["labels"]), (12,), generator=draw)
        model.train()(**{name: tensor[rows] for name, tensor in data.items()}).loss.backward()
        run.step()
    return model


def upright(classes) -> dict:
    """The test digits of some classes as the base knows them."""
    data = rows_of("test", classes)
    return {**data, "pixels": torch.rot90(-data["pixels"], -1, (1, 2))}


def measure(smoke: bool):
    """Per side, at the rate that its mean validation accuracy on the new classes chooses: accuracy
    on new and on retained classes, one number a seed."""
    rates, seeds = (RATES[:1], SEEDS[:1]) if smoke else (RATES, SEEDS)
    kept, found = upright([c for c in range(10) if c not in NEW]), {}
    for side, (method, options) in SIDES.items():
        runs = {}
        for rate, seed in itertools.product(rates, seeds):
            model = trained(method, options, rate, seed, 5 if smoke else STEPS)
            splits = (rows_of("validation", NEW), rows_of("test", NEW), kept)
            runs.setdefault(rate, []).append([accuracy(model, data) for data in splits])
        best = max(runs, key=lambda rate: statistics.fmean(r[0] for r in runs[rate]))
        _, new, retained = map(list, zip(*runs[best], strict=True))
        found[side] = {"rate": best, "new": new, "retained": retained}
    return found


def judge(outcome) -> Verdict:
    """Retained accuracy must gain, and the new task's may lose at most two points."""
    ours, theirs = (outcome["measured"][side] for side in SIDES)
    gains = [a - b for a, b in zip(ours["retained"], theirs["retained"], strict=True)]
    mean, half = interval(gains)
    new, other = statistics.fmean(ours["new"]), statistics.fmean(theirs["new"])
    outcome_ = SHOWN if mean - half > 0 else CONTRADICTED if mean + half < 0 else NOT_SHOWN
    if new < other - 0.02:
        outcome_ = CONTRADICTED if outcome_ == CONTRADICTED else NOT_SHOWN
    return Verdict(
        outcome_,
        f"retained accuracy {statistics.fmean(ours['retained']):.3f} against "
        f"{statistics.fmean(theirs['retained']):.3f} (gain {mean:+.3f} ± {half:.2g}); new classes "
        f"{new:.3f} against {other:.3f}.",
    )


CLAIM = Claim(
    slug="comp-lora",
    paper="Wang et al., 2025, arXiv 2501.15040",
    statement="after few-shot tuning on three turned classes, Comp-LoRA keeps more accuracy on the "
    "seven others than LoRA, at the new classes' accuracy within two points",
    measure=measure,
    judge=judge,
    note="ViT (4 layers of 64) trained on 800 digits; six turned digits of each of 0, 1, 2; what "
    "is retained is measured on upright digits of 3 to 9 that the base never saw.",
)

if __name__ == "__main__":
    main(CLAIM)
