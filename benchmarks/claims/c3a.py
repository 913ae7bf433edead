"""C3A's full-rank blocks do with fewer parameters what LoRA does with more."""

from lab import Claim, Contender, compare, figures, main
from lab.verdict import all_of, at_most

CLAIM = Claim(
    slug="c3a",
    paper="Chen et al., 2024, arXiv 2407.19342",
    statement="at two thirds of the parameters of LoRA r=2, C3A's loss is below LoRA's",
    task="digits-vit",
    contenders=(
        Contender("lora r=2", "lora", {"rank": 2, "alpha": 2}),
        Contender("c3a", "c3a", {"block": 32}, rates=(1e-2, 3e-2, 1e-1, 3e-1)),
    ),
    judge=lambda found: all_of(
        at_most(
            figures(found, "c3a", "parameters")[0] / figures(found, "lora r=2", "parameters")[0],
            0.67,
            "C3A's parameters over LoRA's",
        ),
        compare(found, "c3a", "lora r=2"),
    ),
    note="dW is divided by the inputs, so C3A's rates lie an order of magnitude higher.",
)

if __name__ == "__main__":
    main(CLAIM)
