"""HiRA's change of high rank fits better than LoRA's with as many parameters."""

from lab import Claim, Contender, compare, main

CLAIM = Claim(
    slug="hira",
    paper="Huang et al., ICLR 2025",
    statement="where the change has full rank, HiRA's loss is below LoRA's of the same size",
    task="digits-shuffled",
    contenders=(
        Contender("lora r=8", "lora", {"rank": 8, "alpha": 8}),
        Contender("hira r=8", "hira", {"rank": 8}),
    ),
    judge=lambda found: compare(found, "hira r=8", "lora r=8"),
    note="HiRA has no scaling; both are tuned over the same four rates.",
)

if __name__ == "__main__":
    main(CLAIM)
