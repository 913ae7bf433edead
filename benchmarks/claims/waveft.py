"""WaveFT beats LoRA where parameters are fewest."""

from lab import Claim, Contender, compare, figures, main
from lab.verdict import all_of, at_most

CLAIM = Claim(
    slug="waveft",
    paper="Bilican et al., 2025, arXiv 2505.12532",
    statement="with the parameters of LoRA of rank 1, WaveFT's loss is below LoRA's",
    task="digits-vit",
    contenders=(
        Contender("lora r=1", "lora", {"rank": 1, "alpha": 1}),
        Contender("waveft", "waveft", {"coefficients": 192, "scaling": 1.0}),
    ),
    judge=lambda found: all_of(
        at_most(
            figures(found, "waveft", "parameters")[0] / figures(found, "lora r=1", "parameters")[0],
            1.0,
            "WaveFT's parameters over LoRA's",
        ),
        compare(found, "waveft", "lora r=1"),
    ),
    note="192 coefficients at every site, where LoRA of rank 1 has 128 or 320.",
)

if __name__ == "__main__":
    main(CLAIM)
