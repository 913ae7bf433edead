"""NOLA keeps LoRA's quality below the parameters of rank 1, where LoRA cannot go."""

from lab import Claim, Contender, compare, figures, main
from lab.verdict import all_of, at_most

CLAIM = Claim(
    slug="nola",
    paper="Koohpayegani et al., 2023, arXiv 2310.02556",
    statement="with fewer parameters than LoRA of rank 1, NOLA reaches LoRA's loss within 0.1",
    task="digits-vit",
    contenders=(
        Contender("lora r=1", "lora", {"rank": 1, "alpha": 1}),
        Contender("nola", "nola", {"rank": 8, "alpha": 8, "k_a": 32, "k_b": 32}),
    ),
    judge=lambda found: all_of(
        compare(found, "nola", "lora r=1", margin=0.1),
        at_most(
            figures(found, "nola", "parameters")[0] / figures(found, "lora r=1", "parameters")[0],
            0.5,
            "NOLA's parameters over LoRA's",
        ),
    ),
    note="64 coefficients a site, where rank 1 takes 128 or 320.",
)

if __name__ == "__main__":
    main(CLAIM)
