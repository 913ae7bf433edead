"""DeLoRA stays usable at learning rates that ruin LoRA."""

from lab import Claim, Contender, main
from lab.verdict import Outcome, Verdict, at_most

RATES = (1e-3, 1e-2, 1e-1, 3e-1)


def worst(found: Outcome, label: str) -> float:
    """The validation loss at the rate that suits least."""
    losses = found["contenders"][label]["rates"].values()
    return max(loss if loss == loss else float("inf") for loss in losses)


def judge(found: Outcome) -> Verdict:
    ours, theirs = worst(found, "delora"), worst(found, "lora")
    return at_most(ours, theirs, f"DeLoRA's worst loss over rates {RATES[0]:g} to {RATES[-1]:g}")


CLAIM = Claim(
    slug="delora",
    paper="Bini et al., 2025, arXiv 2503.18225",
    statement="over learning rates from 0.001 to 0.3, DeLoRA's worst loss is below LoRA's",
    task="digits-vit",
    contenders=(
        Contender("lora", "lora", {"rank": 8, "alpha": 8}, rates=RATES),
        Contender("delora", "delora", {"rank": 8, "strength": 1.0}, rates=RATES),
    ),
    judge=judge,
    note="strength bounds the change by the length of W's columns.",
)

if __name__ == "__main__":
    main(CLAIM)
