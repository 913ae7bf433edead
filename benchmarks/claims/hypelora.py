"""LoRA is calibrated like full training, a hypernetwork's LoRA like LoRA."""

import itertools
import statistics

import torch
from lab import Claim, main
from lab.tasks import TASKS
from lab.verdict import Verdict, all_of, at_most

import plait
from plait.evaluation.calibration import ece

RATES, SEEDS, STEPS = (1e-3, 3e-3, 1e-2, 3e-2), (0, 1, 2), 200
PAIR = {"rank": 8, "alpha": 16}
SIDES = {
    "full": ("full", {}, (3e-4, 1e-3, 3e-3, 1e-2)),
    "lora": ("lora", PAIR, RATES),
    "hypelora, A fixed": ("hypelora", PAIR, RATES),
    "hypelora, A generated": ("hypelora", {**PAIR, "factor_a": "generated"}, RATES),
}
TASK = TASKS["digits-few"]


def trained(method: str, options: dict, rate: float, seed: int, steps: int):
    torch.manual_seed(seed)
    model = TASK.fresh()
    if method == "full":
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    else:
        plait.attach(model, method, targets=TASK.targets, seed=seed, **options)
        optimizer = plait.RuleStack(model, lr=rate).optimizer
    model.train()
    for batch in itertools.islice(TASK.batches(seed), steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval()


def measure(smoke: bool):
    """Per side, at the rate with the lowest mean validation loss: test ECE and accuracy by seed."""
    found, test = {}, TASK.splits()["test"]
    for side, (method, options, rates) in SIDES.items():
        rates, seeds = (rates[:1], SEEDS[:1]) if smoke else (rates, SEEDS)
        runs = {}
        for rate, seed in itertools.product(rates, seeds):
            model = trained(method, options, rate, seed, 5 if smoke else STEPS)
            with torch.no_grad():
                sure = model(**test).logits.softmax(-1)
            loss = TASK.score(model, "validation")["loss"]
            hits = (sure.argmax(-1) == test["labels"]).double().mean().item()
            runs.setdefault(rate, []).append((loss, ece(sure, test["labels"]), hits))
        best = min(runs, key=lambda rate: statistics.fmean(r[0] for r in runs[rate]))
        _, errors, hits = map(list, zip(*runs[best], strict=True))
        found[side] = {"rate": best, "ece": errors, "accuracy": hits}
    return found


def judge(outcome) -> Verdict:
    """Differences of mean ECE that the paper would call parity: at most 0.02 worse."""
    mean = {side: statistics.fmean(f["ece"]) for side, f in outcome["measured"].items()}
    return all_of(
        at_most(mean["lora"] - mean["full"], 0.02, "LoRA's ECE over full training's"),
        at_most(mean["hypelora, A fixed"] - mean["lora"], 0.02, "HypeLoRA's (A fixed) over LoRA's"),
        at_most(mean["hypelora, A generated"] - mean["lora"], 0.02, "with A generated"),
    )


CLAIM = Claim(
    slug="hypelora",
    paper="Trojan and Gębala, 2026, arXiv 2603.19278",
    statement="the expected calibration error of LoRA is full training's, and that of LoRA factors "
    "from a hypernetwork is LoRA's (each at most 0.02 above)",
    measure=measure,
    judge=judge,
    note="ViT (4 layers of 64) trained on 800 digits, adapted to six turned and inverted digits a "
    "class; ECE with ten bins. The paper's runs are RoBERTa on GLUE.",
)

if __name__ == "__main__":
    main(CLAIM)
