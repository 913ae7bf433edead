"""LoHa makes a change of high rank from the parameters of a low-rank one."""

from lab import Claim, Contender, compare, main

CLAIM = Claim(
    slug="loha",
    paper="Yeh et al., 2023, arXiv 2309.14859",
    statement="where the change must be of high rank, LoHa ends at a lower loss than LoRA with the "
    "same number of parameters",
    task="digits-shuffled",
    contenders=(
        Contender("loha r=4", "loha", {"rank": 4, "alpha": 4}),
        Contender("lora r=8", "lora", {"rank": 8, "alpha": 8}),
    ),
    seeds=(0, 1, 2, 3, 4),
    judge=lambda found: compare(found, "loha r=4", "lora r=8"),
    note="LoHa's dW has rank 16 here, LoRA's 8.",
)

if __name__ == "__main__":
    main(CLAIM)
