"""LoRA-GA converges two to four times faster than LoRA."""

import statistics

from lab import Claim, Contender, Verdict, main
from lab.verdict import CONTRADICTED, NOT_SHOWN, SHOWN


def steps_to(curve: list[float], goal: float, width: int = 10) -> int:
    """The first step whose mean loss over the `width` steps before it is at most `goal`."""
    for end in range(width, len(curve) + 1):
        if statistics.fmean(curve[end - width : end]) <= goal:
            return end
    return len(curve) + 1


def judge(found):
    sides = {name: side["trials"] for name, side in found["contenders"].items()}
    shares = []
    for ours, theirs in zip(sides["lora-ga"], sides["lora"], strict=True):
        goal = statistics.fmean(theirs["curve"][-20:])
        shares.append(steps_to(ours["curve"], goal) / len(theirs["curve"]))
    outcome = SHOWN if max(shares) <= 0.5 else CONTRADICTED if min(shares) > 1 else NOT_SHOWN
    text = ", ".join(f"{share:.2f}" for share in shares)
    return Verdict(outcome, f"share of the steps to LoRA's last loss, by seed: {text} (claim 0.5).")


CLAIM = Claim(
    slug="lora-ga",
    paper="Wang et al., 2024, arXiv 2407.05000",
    statement="LoRA-GA reaches LoRA's final training loss in at most half of the steps",
    task="digits-vit",
    contenders=(
        Contender("lora", "lora", {"rank": 4, "alpha": 4}),
        Contender("lora-ga", "lora", {"rank": 4, "alpha": 4}, initializer="lora-ga"),
    ),
    judge=judge,
)

if __name__ == "__main__":
    main(CLAIM)
