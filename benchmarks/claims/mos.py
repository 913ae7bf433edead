"""MoS needs a fraction of LoRA's parameters for LoRA's quality."""

from lab import Claim, Contender, compare, figures, main
from lab.verdict import all_of, at_most

CLAIM = Claim(
    slug="mos",
    paper="Wang et al., 2024, arXiv 2410.00938",
    statement="MoS at a quarter of the parameters of LoRA r=8 comes within 0.1 of its loss, and "
    "below LoRA r=2 of the same size",
    task="digits-vit",
    contenders=(
        Contender("lora r=8", "lora", {"rank": 8, "alpha": 8}),
        Contender("lora r=2", "lora", {"rank": 2, "alpha": 2}),
        Contender("mos", "mos", {"equivalent_rank": 2}),
    ),
    judge=lambda found: all_of(
        at_most(
            figures(found, "mos", "parameters")[0] / figures(found, "lora r=8", "parameters")[0],
            0.251,
            "MoS's parameters over LoRA's",
        ),
        compare(found, "mos", "lora r=8", margin=0.1),
        compare(found, "mos", "lora r=2"),
    ),
    note="The paper saves a factor of 8 by sharing over 32 layers; four layers allow a quarter.",
)

if __name__ == "__main__":
    main(CLAIM)
