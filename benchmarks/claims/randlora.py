"""RandLoRA fits a change of full rank that LoRA of the same size cannot."""

from lab import Claim, Contender, compare, figures, main
from lab.verdict import all_of, at_most

CLAIM = Claim(
    slug="randlora",
    paper="Albert et al., 2025, arXiv 2502.00987",
    statement="where the change has full rank, RandLoRA's loss is below that of LoRA with as many "
    "parameters",
    task="digits-shuffled",
    contenders=(
        Contender("lora r=4", "lora", {"rank": 4, "alpha": 4}),
        Contender("randlora", "randlora", {"rank": 13, "alpha": 26}),
    ),
    judge=lambda found: all_of(
        at_most(
            figures(found, "randlora", "parameters")[0]
            / figures(found, "lora r=4", "parameters")[0],
            1.01,
            "RandLoRA's parameters over LoRA's",
        ),
        compare(found, "randlora", "lora r=4"),
    ),
    note="Bases of rank 13 give 1,795 parameters, LoRA of rank 4 has 1,792.",
)

if __name__ == "__main__":
    main(CLAIM)
