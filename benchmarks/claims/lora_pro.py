"""LoRA-Pro beats LoRA and closes most of the distance to full training."""

from lab import Claim, Contender, compare, main
from lab.verdict import CONTRADICTED, NOT_SHOWN, SHOWN, Verdict, all_of, figures, interval

LORA = {"rank": 4, "alpha": 4}


def closes_half(found):
    """Half of the distance between LoRA's loss and full training's, seed by seed."""
    sides = (figures(found, name) for name in ("lora", "lora-pro", "full"))
    gains = [(a + c) / 2 - b for a, b, c in zip(*sides, strict=True)]
    mean, half = interval(gains)
    outcome = SHOWN if mean - half > 0 else CONTRADICTED if mean + half < 0 else NOT_SHOWN
    return Verdict(
        outcome, f"below the middle of LoRA and full training by {mean:.4g} ± {half:.2g}."
    )


CLAIM = Claim(
    slug="lora-pro",
    paper="Wang et al., 2024, arXiv 2407.18242",
    statement="LoRA-Pro ends at a lower loss than LoRA of the same rank, below the middle between "
    "LoRA and full training",
    task="digits-shuffled",
    contenders=(
        Contender("full", "full"),
        Contender("lora", "lora", LORA),
        Contender("lora-pro", "lora", LORA, rules=({"lora-pro": {"moments": "full"}},)),
        Contender("lora-pro, LoRA's memory", "lora", LORA, rules=("lora-pro",)),
    ),
    judge=lambda found: all_of(compare(found, "lora-pro", "lora"), closes_half(found)),
    note="The paper's form, with Adam's moments of dW's size. The claim was first tried with Adam "
    "on the adjusted gradients alone, which does worse than LoRA; its figures stand beside.",
)

if __name__ == "__main__":
    main(CLAIM)
