"""LoLDU needs far fewer parameters than a LoRA for a comparable score."""

from lab import Claim, Contender, compare, figures, main
from lab.verdict import all_of, at_most

RATES = (3e-3, 1e-2, 3e-2, 1e-1)
CLAIM = Claim(
    slug="loldu",
    paper="Shi et al., 2024, arXiv 2410.13618",
    statement="with at most a third of the parameters of LoRA r=1, LoLDU comes within 0.1 of its "
    "loss, and its uniform start is no worse than the one at the base by more than 0.05",
    task="digits-vit",
    contenders=(
        Contender("lora r=1", "lora", {"rank": 1, "alpha": 1}, rates=RATES),
        Contender("loldu", "loldu", {"rank": 64}, rates=RATES),
        Contender("loldu uniform", "loldu", {"rank": 64, "start": "uniform"}, rates=RATES),
    ),
    judge=lambda found: all_of(
        at_most(
            figures(found, "loldu", "parameters")[0] / figures(found, "lora r=1", "parameters")[0],
            0.334,
            "LoLDU's parameters over LoRA's",
        ),
        compare(found, "loldu", "lora r=1", margin=0.1),
        compare(found, "loldu uniform", "loldu", margin=0.05),
    ),
    note="The paper counts 2,600 times fewer than LoRA of a high rank in wide layers; r is here "
    "the whole width of 64.",
)

if __name__ == "__main__":
    main(CLAIM)
