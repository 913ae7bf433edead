"""RoAd matches LoRA with a fraction of its parameters."""

from lab import Claim, Contender, compare, figures, main
from lab.verdict import all_of, at_most

CLAIM = Claim(
    slug="road",
    paper="Liao, Monz, 2024, arXiv 2409.00119",
    statement="RoAd with half of the parameters of LoRA r=1 comes within 0.1 of its loss, and with "
    "as many beats it",
    task="digits-vit",
    contenders=(
        Contender("lora", "lora", {"rank": 1, "alpha": 1}),
        Contender("road 1", "road", {"variant": 1}, rates=(3e-3, 1e-2, 3e-2, 1e-1)),
        Contender("road 2", "road", {"variant": 2}, rates=(3e-3, 1e-2, 3e-2, 1e-1)),
    ),
    judge=lambda found: all_of(
        at_most(
            figures(found, "road 1", "parameters")[0] / figures(found, "lora", "parameters")[0],
            0.5,
            "RoAd's parameters over LoRA's",
        ),
        compare(found, "road 1", "lora", margin=0.1),
        compare(found, "road 2", "lora"),
    ),
)

if __name__ == "__main__":
    main(CLAIM)
