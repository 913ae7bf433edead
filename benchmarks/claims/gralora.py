"""GraLoRA gets more out of a LoRA's parameters by cutting them up."""

from lab import Claim, Contender, compare, main

CLAIM = Claim(
    slug="gralora",
    paper="Jung et al., 2025, arXiv 2505.20355",
    statement="at equal parameters a grid of small adapters ends at a lower loss than one adapter",
    task="digits-shuffled",
    contenders=(
        Contender("gralora r=8, k=4", "gralora", {"rank": 8, "k": 4, "alpha": 8}),
        Contender("lora r=8", "lora", {"rank": 8, "alpha": 8}),
    ),
    seeds=(0, 1, 2, 3, 4),
    judge=lambda found: compare(found, "gralora r=8, k=4", "lora r=8"),
    note="The paper sees the gain from rank 64 on, in layers of 2,048 to 4,096.",
)

if __name__ == "__main__":
    main(CLAIM)
