"""LoKr reaches full rank with the parameters of LoRA at rank 1."""

from lab import Claim, Contender, compare, figures, main
from lab.verdict import all_of, at_most

CLAIM = Claim(
    slug="lokr",
    paper="Yeh et al., 2023, arXiv 2309.14859",
    statement="where the change must be of high rank, LoKr ends at a lower loss than LoRA with "
    "about as many parameters",
    task="digits-shuffled",
    contenders=(
        Contender("lokr", "lokr", {"rank": 1000, "alpha": 1000}),
        Contender("lora r=1", "lora", {"rank": 1, "alpha": 1}),
    ),
    seeds=(0, 1, 2, 3, 4),
    judge=lambda found: all_of(
        compare(found, "lokr", "lora r=1"),
        at_most(
            figures(found, "lokr", "parameters")[0] / figures(found, "lora r=1", "parameters")[0],
            1.15,
            "LoKr's parameters over LoRA's",
        ),
    ),
    note="Both factors of LoKr are full: 192 and 320 numbers, where rank 1 takes 192 and 256.",
)

if __name__ == "__main__":
    main(CLAIM)
